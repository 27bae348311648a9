"""Train the demo model of `hf_prune/demo_model` from scratch: a tokenizer and a two-million-parameter Llama, on a CPU.

The text is one file: a paragraph a line, a blank line between books. Some books are kept out of training; the openings
of those become `calibration.txt` and `evaluation.txt` of the output folder, so the demo needs nothing but that folder.
The bundled model was made by

    python examples/train_demo_model.py --data ../shared/data/prose/novels.txt --output hf_prune/demo_model

and a mixture of experts for `tests/benchmarks/experts.py` (29 million parameters, 8 layers, 16 experts, two for a
token; three minutes of one GPU, or an hour or two of one core) by

    python examples/train_demo_model.py --output refmoe --num-experts 16 --tokenizer ../shared/models/ref10m \
        --more-data ../shared/data/wikitext2/train.txt --hidden-size 256 --intermediate-size 256 --num-layers 8 \
        --head-dim 32 --batch-size 32 --steps 2500 --work-dir runs/refmoe

An interrupted run goes on from its last checkpoint in `--work-dir`.
"""

import json
import math
import os
import time
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

DEFAULT_DATA = Path(os.environ.get("HF_PRUNE_DATA", "../shared")) / "data/prose/novels.txt"
END_OF_BOOK = "<|endoftext|>"
PROMPTS = (
    "The old man looked at the sea and",
    '"My dear Watson," said Holmes,',
    "When the snow began to fall, the girl",
)


def opening(book: str, num_characters: int) -> str:
    """Return the whole paragraphs that fit into the first `num_characters` of `book`."""
    return book if len(book) <= num_characters else book[: book.rindex("\n", 0, num_characters)]


def train_tokenizer(books: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE: any text can be encoded, and decoding gives it back unchanged."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        books, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END_OF_BOOK], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END_OF_BOOK, eos_token=END_OF_BOOK, pad_token=END_OF_BOOK
    )


def new_model(
    tokenizer: PreTrainedTokenizerFast,
    hidden_size: int,
    intermediate_size: int,
    num_layers: int,
    head_dim: int,
    num_experts: int,
) -> PreTrainedModel:
    """Make an untrained Llama (a Mixtral with experts, two of them for a token): 8 query heads on 4 KV groups, tied."""
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": head_dim,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if not num_experts:
        return LlamaForCausalLM(LlamaConfig(**sizes))
    return MixtralForCausalLM(
        MixtralConfig(
            **sizes,
            num_local_experts=num_experts,
            num_experts_per_tok=2,
            output_router_logits=True,
            router_aux_loss_coef=0.02,
        )
    )


def windows(tokenizer: PreTrainedTokenizerFast, text: str, window: int) -> list[dict[str, torch.Tensor]]:
    """Cut the tokens of `text` into non-overlapping windows; an incomplete last one is dropped."""
    token_ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return [{"input_ids": part, "labels": part} for part in token_ids.split(window) if len(part) == window]


def save(model: PreTrainedModel, folder: Path) -> None:
    """Save bfloat16 tensors, which are small, and `dtype` float32 in config.json: a plain load computes in float32."""
    model.config.use_cache = True
    if getattr(model.config, "output_router_logits", False):
        model.config.output_router_logits = False  # the loss of training only
    model.to(torch.bfloat16).save_pretrained(folder)
    config_path = folder / "config.json"
    config_path.write_text(json.dumps(json.loads(config_path.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
    for path in folder.iterdir():
        path.chmod(0o644)


def perplexity(folder: Path, examples: list[dict[str, torch.Tensor]]) -> float:
    """Exp of the mean token NLL of the saved model over equally long windows, in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        losses = [model(**{name: ids[None] for name, ids in example.items()}).loss.item() for example in examples]
    return math.exp(sum(losses) / len(losses))


def sample(folder: Path, tokenizer: PreTrainedTokenizerFast, seed: int) -> list[str]:
    """Continue each prompt by 60 sampled tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    set_seed(seed)
    texts = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        output = model.generate(**inputs, max_new_tokens=60, do_sample=True, temperature=0.7, top_p=0.9)
        texts.append(tokenizer.decode(output[0], skip_special_tokens=True))
    return texts


def main(
    data: Annotated[Path, typer.Option(help="Books: a paragraph a line, a blank line between books.")] = DEFAULT_DATA,
    output: Annotated[Path, typer.Option(help="Folder for the finished model.")] = Path("demo_model"),
    work_dir: Annotated[Path, typer.Option(help="Folder for checkpoints.")] = Path("runs/demo_model"),
    calibration_books: Annotated[tuple[int, int], typer.Option(help="For calibration.txt, from 0.")] = (16, 29),
    evaluation_books: Annotated[tuple[int, int], typer.Option(help="For evaluation.txt, from 0.")] = (28, 44),
    held_out_characters: Annotated[int, typer.Option(help="Length of each of those two texts.")] = 75_000,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 3500,
    batch_size: Annotated[int, typer.Option(help="Windows per step.")] = 8,
    window: Annotated[int, typer.Option(help="Tokens per window.")] = 256,
    learning_rate: Annotated[float, typer.Option(help="Peak; cosine decay after 3 % warm-up.")] = 3e-3,
    more_data: Annotated[list[Path] | None, typer.Option(help="Further text to train with.")] = None,
    tokenizer_of: Annotated[
        Path | None, typer.Option("--tokenizer", help="Take this model's tokenizer instead of training one.")
    ] = None,
    vocab_size: Annotated[int, typer.Option(help="Tokens of the vocabulary.")] = 2048,
    hidden_size: Annotated[int, typer.Option(help="Hidden channels.")] = 192,
    intermediate_size: Annotated[int, typer.Option(help="MLP units per layer.")] = 384,
    num_layers: Annotated[int, typer.Option(help="Decoder layers.")] = 6,
    head_dim: Annotated[int, typer.Option(help="Channels of a head.")] = 16,
    num_experts: Annotated[int, typer.Option(help="Experts of a layer, two for a token; 0: an ordinary MLP.")] = 0,
    save_steps: Annotated[int, typer.Option(help="Steps between checkpoints and evaluations.")] = 250,
    bf16: Annotated[bool, typer.Option(help="bf16 autocast: slow on a CPU without bf16 instructions.")] = False,
    cuda: Annotated[bool, typer.Option(help="Train on the first GPU.")] = False,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    seed: Annotated[int, typer.Option(help="Seed of the weights, the order of the windows and the samples.")] = 0,
) -> None:
    """Train, save, evaluate and sample the demo model."""
    torch.set_num_threads(threads)
    set_seed(seed)
    settings = {name: value for name, value in locals().items() if not isinstance(value, Path | list)}
    settings.pop("tokenizer_of", None)
    books = data.read_text(encoding="utf-8").strip().split("\n\n")
    held_out = {"calibration": calibration_books, "evaluation": evaluation_books}
    training = [book for i, book in enumerate(books) if i not in calibration_books + evaluation_books]
    if max(calibration_books + evaluation_books) >= len(books) or not training:
        raise typer.BadParameter(f"{data} has {len(books)} books: choose held-out books below that, and leave some.")

    output.mkdir(parents=True, exist_ok=True)
    texts = {
        name: "\n\n".join(opening(books[i], held_out_characters // len(chosen)) for i in chosen)
        for name, chosen in held_out.items()
    }
    for name, text in texts.items():
        (output / f"{name}.txt").write_text(text, encoding="utf-8")
    training += [path.read_text(encoding="utf-8") for path in more_data or ()]
    if tokenizer_of is None:
        tokenizer = train_tokenizer(training, vocab_size)
    else:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    tokenizer.save_pretrained(output)
    train_windows = windows(tokenizer, "".join(book + tokenizer.eos_token for book in training), window)
    model = new_model(tokenizer, hidden_size, intermediate_size, num_layers, head_dim, num_experts)
    print(f"{model.num_parameters():,} parameters, {len(train_windows):,} training windows of {window} tokens")

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(work_dir),
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=batch_size,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, steps * 3 // 100),
            weight_decay=0.1,
            adam_beta2=0.95,
            bf16=bf16,
            use_cpu=not cuda,
            seed=seed,
            eval_strategy="steps",
            eval_steps=save_steps,
            save_steps=save_steps,
            save_total_limit=2,
            logging_steps=max(1, save_steps // 5),
            report_to="none",
        ),
        train_dataset=train_windows,
        eval_dataset=windows(tokenizer, texts["evaluation"], window),
    )
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=get_last_checkpoint(work_dir) if work_dir.exists() else None)
    seconds = time.monotonic() - started

    save(model, output)

    history = trainer.state.log_history
    samples = sample(output, tokenizer, seed)
    log = {
        "settings": settings,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "num_parameters": model.num_parameters(),
        "steps": trainer.state.global_step,
        "tokens": trainer.state.global_step * batch_size * window,
        "train_s": round(seconds, 1),  # of the last start only, if the run was interrupted
        "evaluation_perplexity": perplexity(output, windows(tokenizer, texts["evaluation"], 256)),
        "calibration_perplexity": perplexity(output, windows(tokenizer, texts["calibration"], 256)),
        "loss": [[entry["step"], round(entry["loss"], 4)] for entry in history if "loss" in entry],
        "held_out_perplexity": [
            [entry["step"], round(math.exp(entry["eval_loss"]), 3)] for entry in history if "eval_loss" in entry
        ],
        "samples": samples,
    }
    (output / "train_log.json").write_text(json.dumps(log, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"evaluation perplexity {log['evaluation_perplexity']:.2f}\n\n" + "\n\n".join(samples))


if __name__ == "__main__":
    typer.run(main)
