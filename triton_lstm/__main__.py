import sys

from triton_lstm.cli import main

sys.exit(main())
