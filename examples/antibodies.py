"""A pretrained masked language model (AntiBERTy, of antibodies) on our ops: it fills masked residues in parallel.

Run: make build/antiberty && python examples/antibodies.py
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "build" / "antiberty"))
import antiberty
import transformers

from illada_kernels import Threshold, masked_loss, unmask
from illada_kernels.integrations import patch

FOLDER = Path(antiberty.__file__).parent / "trained_models"
SEQ = "DVVMTQTPFSLPVSLGDQASISCRSSQSLVHSNGNTYLHWYLQKPGQSPKLLIYKVSNRFSGVPDRFSGSGSGTDFTLKISRVEAEDLGVYFCSQSTHVPYTFGGGTKLEIK"
VOCAB = (FOLDER / "vocab.txt").read_text().split()
SPECIAL, CLS, SEP, MASK = range(5), 2, 3, 4
antiberty.AntiBERTy.all_tied_weights_keys = {}  # transformers 5 asks; all weights are in the file
checkpoint = FOLDER / "AntiBERTy_md_smooth"
model = antiberty.AntiBERTy(transformers.BertConfig.from_json_file(checkpoint / "config.json")).eval()
weights = torch.load(checkpoint / "pytorch_model.bin", map_location="cpu", weights_only=True)
assert not model.load_state_dict(weights, strict=False).missing_keys

torch.manual_seed(0)
clean = torch.tensor([[CLS, *map(VOCAB.index, SEQ), SEP]])
masked = (torch.rand(clean.shape) < 0.4) & (clean > MASK)
noisy, everywhere = clean.masked_fill(masked, MASK), torch.ones_like(clean)

# its own code, then ours: attention patched, the loss fused with the head
theirs = model(noisy, everywhere, labels=clean.masked_fill(~masked, -100), return_dict=True).loss
parameters = list(model.bert.encoder.parameters())
gradients = torch.autograd.grad(theirs, parameters)

patch(model)
head = model.cls.predictions


def hidden_of(tokens: torch.Tensor) -> torch.Tensor:
    return head.transform(model.bert(tokens, attention_mask=everywhere)[0])


ours = masked_loss(hidden_of(noisy), head.decoder.weight, clean, masked, head_bias=head.decoder.bias, reduction="mean")
torch.testing.assert_close(ours, theirs, atol=0, rtol=1e-4)
torch.testing.assert_close(torch.autograd.grad(ours, parameters), gradients, atol=1e-5, rtol=1e-3)

tokens, positions, passes = noisy.clone(), masked.nonzero()[None, :, 1], 0
options = {"mask_id": MASK, "forbid": SPECIAL, "head_bias": head.decoder.bias}
while (tokens == MASK).any():
    with torch.no_grad():
        hidden = hidden_of(tokens)[:, positions[0]]
    unmask(hidden, head.decoder.weight, tokens, positions, Threshold(0.9), **options)
    passes += 1
right = int((tokens == clean)[masked].sum())
print(f"loss {ours.item():.4f} as its own code; {right} of {int(masked.sum())} residues recovered in {passes} passes")
