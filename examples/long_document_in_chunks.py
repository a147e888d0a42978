"""Read a document of 4,000 tokens through caches of 256: python examples/long_document_in_chunks.py

The document goes in by chunks, so that the memory is bounded from the first token on and not only at its end. Three
methods read the same document and are asked the same question: one keeps all, two keep 256 tokens per head.
"""

import torch

from kvfloor import models
from kvfloor.hf import CompressedCache, prepare
from kvfloor.tasks import TASKS

CHUNK = 256

model, tokenizer = models.load("builtin")
prepare(model)
sample = TASKS["passkey"].generate(seed=3, index=0, length=4000)
question = sample.questions[0]
document = tokenizer(sample.context, return_tensors="pt").input_ids
ask = tokenizer(question.ask, add_special_tokens=False, return_tensors="pt").input_ids

print(f"{document.shape[1]:,} tokens; {question.ask} ... {question.answer}")
for method in ("exact", "sinks(4)@256", "keydiff@256"):
    cache = CompressedCache(model, method)
    with torch.inference_mode():
        for start in range(0, document.shape[1], CHUNK):
            model(document[:, start : start + CHUNK], past_key_values=cache, logits_to_keep=1)
    whole = torch.cat([document, ask], 1)
    out = model.generate(
        whole, attention_mask=torch.ones_like(whole), past_key_values=cache, do_sample=False, max_new_tokens=6
    )
    answer = tokenizer.decode(out[0, whole.shape[1] :], skip_special_tokens=True)
    held = max(max(layer["held"]) for layer in cache.report())
    print(f"{method:<13} held {held:>5} tokens per head, peak {cache.peak_nbytes:>10,} bytes, answered {answer}")
