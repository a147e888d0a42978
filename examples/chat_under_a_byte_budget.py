"""Chat with a cache that never takes more than a megabyte: python examples/chat_under_a_byte_budget.py

Every turn tells the model some facts and asks for one of them; the last turn asks once more what the first one asked.
A usual cache would keep every token of the conversation; this one evicts, at each turn, what it can do without.
"""

import torch

from kvfloor import models
from kvfloor.hf import CompressedCache, prepare
from kvfloor.tasks import TASKS

model, tokenizer = models.load("builtin")  # or a model of your own
prepare(model)
cache = CompressedCache(model, "keydiff@1MiB")  # the budget is for the whole cache

samples = [TASKS["needles"].generate(seed=1, index=turn, length=400) for turn in range(6)]
turns = [(f"{sample.context} {sample.questions[0].ask}", sample.questions[0].answer) for sample in samples]
turns.append((samples[0].questions[0].ask, samples[0].questions[0].answer))

talk = [tokenizer.bos_token_id]
right = 0
for text, wanted in turns:
    talk += tokenizer(text, add_special_tokens=False).input_ids
    ids = torch.tensor([talk])
    out = model.generate(  # takes the whole talk; computes only what the cache has not seen
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, do_sample=False, max_new_tokens=6
    )
    answer = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    talk = out[0].tolist()
    right += answer == wanted
    print(f"... {text[-37:]} {answer} (wanted {wanted}); {len(talk):,} tokens so far, cache {cache.nbytes:,} bytes")

sizes = model.config
token_bytes = 2 * sizes.num_hidden_layers * sizes.num_key_value_heads * sizes.head_dim * 4
print(f"right {right} of {len(turns)}; budget {2**20:,} bytes, a usual cache {len(talk) * token_bytes:,}")
