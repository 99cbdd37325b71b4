"""One line puts illada_kernels' attention into an encoder of transformers; padding and gradients stay right.

Run: python examples/encoder.py
"""

import torch
from transformers import BertConfig, BertForMaskedLM

from illada_kernels.integrations import transformers as illada

illada.register()

# a fresh model; from_pretrained(folder, attn_implementation="illada") does the same with weights
sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
model = BertForMaskedLM(BertConfig(vocab_size=200, **sizes)).eval()

tokens = torch.randint(1, 200, (3, 40))
lengths = torch.tensor([40, 25, 7])
attention_mask = (torch.arange(40) < lengths[:, None]).long()  # as tokenizers make it

results = {}
for name in ("sdpa", "illada"):
    model.set_attn_implementation(name)  # the one line
    logits = model(tokens, attention_mask=attention_mask).logits[attention_mask.bool()]
    gradient = torch.autograd.grad(logits.square().mean(), model.get_input_embeddings().weight)[0]
    results[name] = logits.detach(), gradient

for ours, theirs in zip(results["illada"], results["sdpa"]):
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
print("logits and gradients agree on", int(attention_mask.sum()), "tokens of 3 padded sequences")
