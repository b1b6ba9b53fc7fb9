import sys

try:
    from triton_lstm.cli import main
except KeyboardInterrupt:  # while PyTorch is being imported
    sys.exit(130)

sys.exit(main())
