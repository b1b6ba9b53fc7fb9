import sys

from triton_lstm.cli import main

if __name__ == "__main__":
    sys.exit(main())
