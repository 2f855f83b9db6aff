"""The formats that rows of prompts come in: files, chat messages, and the logs of servers."""
