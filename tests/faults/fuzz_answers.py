"""Looks for a text that breaks a grader, guided by what code each text reaches. Needs `pip install '.[fuzz]'`.

    python tests/faults/fuzz_answers.py FOLDER -runs=1000000 -max_len=400

The options are libFuzzer's; FOLDER, which must exist, keeps texts that reached something new. It ends with code 0 if
none broke a check, and otherwise keeps the text that did.
"""

import sys

import atheris

with atheris.instrument_imports(include=["policy_split_jax.rewards"]):
    from answer_checks import check


def one(data: bytes) -> None:
    check(data.decode(errors="replace"))


if __name__ == "__main__":
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
