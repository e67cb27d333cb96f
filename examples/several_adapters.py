"""Several adapters on one base: switch, add up, and give every row of a batch its own.

python examples/several_adapters.py
"""

from __future__ import annotations

import torch

import graftlm as gl


def main() -> None:
    """Two adapters with random changes on the embedded base."""
    torch.manual_seed(0)
    model, tokenizer = gl.load_model("sprout", dtype="float32")
    changing = {"init_lora_weights": False}  # trained adapters differ from the base; these do at once
    adapters = gl.attach(model, gl.LoraConfig(r=4, target_modules="attention", **changing), name="tone")
    adapters.add("facts", gl.LoraConfig(r=8, target_modules="mlp", **changing))
    print("adapters:", adapters.names, "active:", adapters.active, "trainable:", adapters.trainable)

    batch = tokenizer(["The old boat", "The old boat", "The old boat"], return_tensors="pt")

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return model(**batch).logits

    tone = logits()
    adapters.activate("facts")
    facts = logits()
    adapters.activate(["tone", "facts"])  # their changes are summed, in any order
    both = logits()
    with adapters.disabled():
        base = logits()

    with adapters.routed(["tone", None, "facts"]):  # one forward pass, one adapter per row
        routed = logits()
    for row, (name, expected) in enumerate((("tone", tone), ("base", base), ("facts", facts))):
        assert torch.allclose(routed[row], expected[row], atol=1e-4), name
    print("routed rows agree with each adapter on its own")
    print(f"largest change by both: {(both - base).abs().max():.2f}")

    with adapters.routed(["tone", None, "facts"]):
        written = model.generate(**batch, max_new_tokens=8, do_sample=False)
    for name, ids in zip(("tone", "base", "facts"), written, strict=True):
        print(f"{name:>6}: {tokenizer.decode(ids, skip_special_tokens=True)}")


if __name__ == "__main__":
    main()
