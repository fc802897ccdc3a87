"""The obvious alternative to `check_files`: datasets, datasketch, and the same rules.

Runs in an environment of its own (`requirements-data.txt`) with the checkout's `src` on its path:
the rules over one record's texts are Outcrop's own functions, applied by `Dataset.map` in two
processes. Tokens are counted by `tokenizers` in batches; near duplicates are found by datasketch's
MinHash, 128 hashes of the same runs of three words, made in two processes, and MinHashLSH. Prints
one line of JSON.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import tempfile
import time
from typing import Any

import datasets  # type: ignore[import-not-found]
import tokenizers
from datasketch import MinHash, MinHashLSH  # type: ignore[import-not-found]

from outcrop.data.checks import personal, texts

NUM_HASHES, THRESHOLD, PROCESSES = 128, 0.85, 2
LIMIT = 8192
_NO_WORD = re.compile(r"[\W_]+")
RULES = (*texts.RULES, personal.pii)


def rules(record: dict[str, Any]) -> dict[str, Any]:
    """Apply every rule over one record's texts, and hash it."""
    prompt, completion = record["prompt"], record["completion"]
    codes = []
    if not isinstance(prompt, str) or not prompt.strip():
        codes.append("empty_prompt")
    elif not isinstance(completion, str) or not completion.strip():
        codes.append("empty_completion")
    else:
        found = (rule(texts.Texts(prompt, completion)) for rule in RULES)
        codes = [finding.code for finding in found if finding is not None]
    said = json.dumps([prompt, completion]).encode()
    return {"codes": codes, "digest": hashlib.sha256(said).hexdigest()}


def count(batch: dict[str, list[Any]], tokenizer: tokenizers.Tokenizer) -> dict[str, list[int]]:
    """Count the tokens of a batch, the template's own not counted."""
    counts = [
        [len(encoding) for encoding in tokenizer.encode_batch_fast(batch[key])]
        for key in ("prompt", "completion")
    ]
    return {"num_tokens": [sum(pair) for pair in zip(*counts, strict=True)]}


def sketch(record: dict[str, Any]) -> dict[str, Any]:
    """Make the MinHash signature of a prompt."""
    words = _NO_WORD.sub(" ", record["prompt"].casefold()).split()
    runs = {" ".join(words[place : place + 3]) for place in range(max(1, len(words) - 2))}
    made = MinHash(num_perm=NUM_HASHES)
    made.update_batch([run.encode() for run in runs])
    return {"signature": made.hashvalues}


def main() -> None:
    """Check one file; arguments: the file, and the tokenizer's."""
    file, tokenizer_file = sys.argv[1:]
    began = time.monotonic()
    datasets.disable_progress_bars()
    datasets.disable_caching()
    with tempfile.TemporaryDirectory() as cache:
        data = datasets.load_dataset("json", data_files=file, split="train", cache_dir=cache)
        data = data.map(rules, num_proc=PROCESSES)
        tokenizer = tokenizers.Tokenizer.from_file(tokenizer_file)
        data = data.map(count, batched=True, fn_kwargs={"tokenizer": tokenizer})
        data = data.map(sketch, num_proc=PROCESSES)
        first: dict[str, int] = {}
        num_exact = sum(
            first.setdefault(digest, place) != place for place, digest in enumerate(data["digest"])
        )
        index = MinHashLSH(threshold=THRESHOLD, num_perm=NUM_HASHES)
        num_near = 0
        scheme = MinHash(num_perm=NUM_HASHES).scheme
        signatures: dict[int, MinHash] = {}
        answers = data["completion"]
        for place, (digest, signature) in enumerate(
            zip(data["digest"], data.with_format("numpy")["signature"], strict=True)
        ):
            if first[digest] != place:
                continue
            made = MinHash(num_perm=NUM_HASHES, hashvalues=signature, scheme=scheme)
            num_near += any(
                answers[other] == answers[place] and made.jaccard(signatures[other]) >= THRESHOLD
                for other in index.query(made)
            )
            index.insert(place, made)
            signatures[place] = made
        tokens = data["num_tokens"]
        print(
            json.dumps(
                {
                    "seconds": time.monotonic() - began,
                    "records": len(data),
                    "tokens": sum(tokens),
                    "too_long": sum(number > LIMIT for number in tokens),
                    "exact": num_exact,
                    "near": num_near,
                    "found": sum(map(len, data["codes"])),
                }
            )
        )


if __name__ == "__main__":
    main()
