"""`python -m csulora_cli` is `csulora`."""

from csulora_cli.cli.main import main

if __name__ == "__main__":
    main()
