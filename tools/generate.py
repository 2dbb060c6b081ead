"""Continue a prompt with an exported model, by transformers."""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_ext.checkpoint.load import check_undamaged
from megatron_ext.errors import CheckpointError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="directory of a Hugging Face checkpoint, such as a step directory of a run")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--tokens", type=int, default=64, help="most tokens to add")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    arguments = parser.parse_args()
    try:
        check_undamaged(Path(arguments.model))
    except CheckpointError as error:
        parser.exit(1, f"error: {error}\n")
    torch.manual_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model)
    prompt = tokenizer(arguments.prompt, return_tensors="pt", add_special_tokens=False)
    sampling = {"do_sample": True, "temperature": arguments.temperature} if arguments.temperature > 0 else {"do_sample": False}
    ids = model.generate(
        input_ids=prompt["input_ids"], attention_mask=prompt["attention_mask"], max_new_tokens=arguments.tokens, pad_token_id=0, **sampling
    )
    print(tokenizer.decode(ids[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
