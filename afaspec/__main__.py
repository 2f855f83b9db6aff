from afaspec.cli import main

main()
