"""The command line: thin commands over `csulora_cli.api`. No torch and no mathematics in here."""
