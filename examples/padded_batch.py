"""Answer prompts of different lengths in one batch: python examples/padded_batch.py

The shorter prompts are padded on the left, as generate() wants it. Pads never enter the cache: every row keeps its own
tokens under its own budget, and answers as it would alone.
"""

from kvfloor import models
from kvfloor.hf import CompressedCache, prepare
from kvfloor.tasks import TASKS

METHOD = "keydiff@96"

model, tokenizer = models.load("builtin")
tokenizer.padding_side = "left"
prepare(model)
samples = [TASKS["recall"].generate(seed=2, index=index, length=length) for index, length in enumerate((60, 200, 450))]
batch = tokenizer([sample.prompt() for sample in samples], return_tensors="pt", padding=True)


def said(cache, **inputs):
    """Return the one-token answer of the model to each prompt."""
    out = model.generate(**inputs, past_key_values=cache, do_sample=False, max_new_tokens=1)
    return tokenizer.batch_decode(out[:, -1:])


# requests= names each conversation, so that a method with random choices makes the same ones in any batch
together = CompressedCache(model, METHOD, requests=[0, 1, 2])
answers = said(together, input_ids=batch.input_ids, attention_mask=batch.attention_mask)
heads = model.config.num_key_value_heads
for row, (sample, answer) in enumerate(zip(samples, answers, strict=True)):
    alone = CompressedCache(model, METHOD, requests=[row])
    prompt = tokenizer(sample.prompt(), return_tensors="pt")
    same = said(alone, input_ids=prompt.input_ids, attention_mask=prompt.attention_mask) == [answer]
    held = [layer["held"][row * heads : (row + 1) * heads] for layer in together.report()]
    assert held == [layer["held"] for layer in alone.report()]
    print(
        f"{prompt.input_ids.shape[1]:>4} tokens and {int((batch.attention_mask[row] == 0).sum()):>3} pads: "
        f"kept {max(map(max, held)):>3} per head, answered {answer} (wanted {sample.questions[0].answer}), "
        f"{'as' if same else 'NOT as'} it does alone"
    )
print(f"{together.nbytes:,} bytes for the batch")
