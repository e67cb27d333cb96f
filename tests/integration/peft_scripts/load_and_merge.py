"""Save an adapter, load it on a fresh base, use it beside another, and merge it into a plain model."""

import os
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

shared = Path(os.environ["GRAFT_SHARED"])
name = str(shared / "models" / "gpt2-tiny-en")
torch.manual_seed(6)

tokenizer = AutoTokenizer.from_pretrained(name)
text = (shared / "data" / "tinyshakespeare" / "train.txt").read_text(encoding="utf-8")[:40_000]
ids = torch.tensor(tokenizer(text).input_ids)
blocks = ids[: len(ids) // 64 * 64].view(-1, 64)


def loss_of(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=blocks[-4:], labels=blocks[-4:]).loss.item()


def train(model, steps, lr):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.train()
    for step in range(steps):
        batch = blocks[4 * step : 4 * step + 4]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step} loss {loss.item():.6f}")


config = LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn", "c_proj"], task_type="CAUSAL_LM")
model = get_peft_model(AutoModelForCausalLM.from_pretrained(name), config)
train(model, 10, 5e-3)
print(f"trained loss {loss_of(model):.6f}")

with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    print(sorted(path.name for path in Path(folder).glob("adapter_*")))

    config = PeftConfig.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(config.base_model_name_or_path)
    print(f"base loss {loss_of(base):.6f}")
    model = PeftModel.from_pretrained(base, folder)
    print("trainable after loading:", sum(p.numel() for p in model.parameters() if p.requires_grad))
    print(f"loaded loss {loss_of(model):.6f}")

    model.load_adapter(folder, adapter_name="again", is_trainable=True)
    model.set_adapter("again")
    print("active:", model.active_adapters, "adapters:", sorted(model.peft_config))
    train(model, 5, 5e-3)
    print(f"again loss {loss_of(model):.6f}")
    model.set_adapter("default")
    print(f"default loss {loss_of(model):.6f}")
    with model.disable_adapter():
        print(f"disabled loss {loss_of(model):.6f}")

    merged = model.merge_and_unload()
    print(type(merged).__name__, f"merged loss {loss_of(merged):.6f}")
    merged.save_pretrained(Path(folder) / "merged")
    plain = AutoModelForCausalLM.from_pretrained(Path(folder) / "merged")
    print(f"plain loss {loss_of(plain):.6f}")

prompt = tokenizer("First Citizen:", return_tensors="pt")
print(tokenizer.decode(plain.generate(**prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)[0]))
