"""A language model of characters, trained on documents that are packed end to end, without padding.

With cu_seqlens= no document sees the one before it: results and gradients are those of every document run alone.

    python examples/packed_documents.py --steps 60
"""

import argparse
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

import triton_lstm
from triton_lstm.settings import device_for

DOCUMENTS = [
    "a rolling stone gathers no moss",
    "all that glitters is not gold",
    "better late than never",
    "every cloud has a silver lining",
    "fortune favours the bold",
    "no news is good news",
    "practice makes perfect",
    "the early bird catches the worm",
    "two heads are better than one",
    "when in rome do as the romans do",
]
END = "\n"  # the first input and the last target of every document
CHARACTERS = END + "".join(sorted(set("".join(DOCUMENTS))))
DOCUMENTS_PER_PACK, EMBED, HIDDEN = 4, 8, 32  # tiny: off a GPU the kernels run in Triton's interpreter


class Pack(NamedTuple):
    """Inputs and targets (T, 1), T characters of all documents, and cu_seqlens: 0, then where each document ends."""

    inputs: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor


def pack(documents: list[str], device: torch.device) -> Pack:
    """Targets are shifted inside every document, before it is packed, so that none belongs to the next document."""
    codes = [torch.tensor([CHARACTERS.index(c) for c in END + document + END]) for document in documents]
    inputs, targets = torch.cat([code[:-1] for code in codes]), torch.cat([code[1:] for code in codes])
    lengths = torch.tensor([len(code) - 1 for code in codes])
    # On the CPU, cu_seqlens lets documents run side by side; on the GPU it becomes resets, and nothing waits for it
    cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return Pack(inputs.unsqueeze(1).to(device), targets.unsqueeze(1).to(device), cu_seqlens)


class CharacterModel(nn.Module):
    """Logits (T, 1, characters) of what follows every character (T, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(CHARACTERS), EMBED)
        self.lstm = triton_lstm.LSTM(EMBED, HIDDEN)
        self.head = nn.Linear(HIDDEN, len(CHARACTERS))

    def forward(self, inputs: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(self.embedding(inputs), cu_seqlens=cu_seqlens)[0])


def loss_of(model: nn.Module, batch: Pack) -> torch.Tensor:
    return F.cross_entropy(model(batch.inputs, batch.cu_seqlens).flatten(0, 1), batch.targets.flatten())


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small language model on packed documents.")
    parser.add_argument("--steps", type=int, default=20, help="each on one pack (default: %(default)s)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: the GPU if there is one")
    args = parser.parse_args()
    device = device_for(args.device)
    torch.manual_seed(0)
    model = CharacterModel().to(device)
    adam = torch.optim.Adam(model.parameters(), lr=2e-2)
    for step in range(1, args.steps + 1):
        chosen = torch.randperm(len(DOCUMENTS))[:DOCUMENTS_PER_PACK].tolist()
        batch = pack([DOCUMENTS[i] for i in chosen], device)
        loss = loss_of(model, batch)
        adam.zero_grad()
        loss.backward()
        adam.step()
        if step % 5 == 0 or step in (1, args.steps):
            print(f"step {step}: loss {loss:.4f} over {len(batch.targets)} characters", flush=True)


if __name__ == "__main__":
    main()
