"""Fine-tunes a checkpoint on conversations packed end to end, as iLLaDA does: no padding, anything may be masked.

Run: python examples/conversations.py [folder]      default: a tiny checkpoint, made here
"""

import sys
import tempfile

import illada
import torch

from illada_kernels import KeyRanges, masked_loss

torch.manual_seed(0)
folder = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()
if len(sys.argv) == 1:
    sizes = {"dim": 96, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 24, "ffn_dim": 192}
    config = illada.ModelConfig(**sizes, vocab_size=258, mask_id=256, eos_id=257, max_seq_len=128)
    illada.save(illada.Model(config), folder)

model = illada.load(folder, dtype=torch.float32)
mask_id, eos_id = model.config.mask_id, model.config.eos_id

CONVERSATIONS = [  # prompt, response; bytes are the tokens here, a real checkpoint has its tokenizer
    ("What is the capital of France? ", "Paris."),
    ("Two plus two? ", "Four."),
    ("The opposite of hot? ", "Cold."),
]
rows = [[*prompt.encode(), *response.encode(), eos_id] for prompt, response in CONVERSATIONS] * 4
clean = torch.tensor([[token for row in rows for token in row]])  # (1, tokens), end to end
lengths = torch.tensor([len(row) for row in rows])
cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
ranges = KeyRanges.packed(cu_seqlens, clean.shape[1])  # no token sees another conversation
positions = torch.cat([torch.arange(n) for n in lengths])[None]

optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=500)
losses = []
for _ in range(500):
    p = torch.rand(len(rows)).clamp(min=0.05).repeat_interleave(lengths)[None]  # one rate a conversation
    masked = torch.rand(clean.shape) < p
    hidden = model(clean.masked_fill(masked, mask_id), ranges, positions)
    # the denominator counts all tokens, so that it may be split over steps and ranks
    loss = masked_loss(hidden, model.head_weight, clean, masked, weight=1 / (p * clean.numel()))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    decay.step()
    losses.append(loss.item())

illada.save(model, folder)
model = illada.load(folder, dtype=torch.float32).eval()
settings = illada.GenerationConfig(max_new_tokens=8, block_length=8)
answers = illada.generate(model, [list(prompt.encode()) for prompt, _ in CONVERSATIONS], settings)
for (prompt, _), answer in zip(CONVERSATIONS, answers.tokens):
    print(prompt + bytes(t for t in answer if t < 256).decode())
print(f"loss {sum(losses[:20]) / 20:.2f} to {sum(losses[-20:]) / 20:.2f}")
