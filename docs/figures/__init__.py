"""The pictures of docs/: `python docs/figures`, or `make figures`, writes them to docs/images."""
