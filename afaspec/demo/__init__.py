"""The whole product once: another domain for the embedded draft, and what that brought."""
