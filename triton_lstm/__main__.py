import sys

from triton_lstm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
