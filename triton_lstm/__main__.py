import sys

try:
    from triton_lstm.cli import main
except KeyboardInterrupt:  # while PyTorch is being imported
    sys.exit(130)

if __name__ == "__main__":
    sys.exit(main())
