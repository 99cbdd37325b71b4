"""transformers' Trainer with our loss in two lines: a mixin that fuses it with the head, and a collator that masks.

Run: python examples/trainer.py
"""

import tempfile

import transformers

from illada_kernels import integrations
from illada_kernels.integrations.trainer import MaskedDiffusion, MaskingCollator, compute_loss

MASK, PAD = 3, 0
WORDS = "[pad] the quick [mask] brown fox jumps over a lazy dog while cats sleep".split()
TEXTS = ["the quick brown fox jumps over a lazy dog", "cats sleep while a lazy dog jumps", "the brown fox jumps"]
data = [{"input_ids": [WORDS.index(word) for word in text.split()]} for text in TEXTS] * 32

sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
config = transformers.BertConfig(vocab_size=len(WORDS), attention_probs_dropout_prob=0.0, **sizes)
model = transformers.BertForMaskedLM(config)
integrations.patch(model)  # attention on our ops too; it has no dropout


class DiffusionTrainer(MaskedDiffusion, transformers.Trainer):  # the first line
    pass


steps = {"max_steps": 80, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "learning_rate": 5e-3}
quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_steps": 20}
settings = transformers.TrainingArguments(tempfile.mkdtemp(), **steps, **quiet)
collator = MaskingCollator(MASK, PAD)  # the second
trainer = DiffusionTrainer(model, settings, train_dataset=data, eval_dataset=data, data_collator=collator)
before = trainer.evaluate()["eval_loss"]
trainer.train()
after = trainer.evaluate()["eval_loss"]
print(f"eval loss {before:.2f} to {after:.2f}")

# a loop without Trainer calls the same function
batch = {key: value.to(model.device) for key, value in collator(data[:8]).items()}
print(f"one batch by hand {compute_loss(model.eval(), batch).item():.2f}")
