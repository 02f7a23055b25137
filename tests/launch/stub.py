"""Stands for a program on PATH: records how it was called, and answers from a script.

    stub.py NAME ARGUMENT ...

LAUNCH_STUBS is a folder. `calls.jsonl` gets a line per call. `answers.json` maps patterns, searched in the call's words
joined by spaces, to lists of [exit code, output]: each call takes the next, the last one is kept. `workers/` makes
gcloud's ssh and scp real: they run in each of its folders as the home directory of a worker. Few imports: it starts
often.
"""

import json
import os
import re
import sys


def main(name: str, *arguments: str) -> int:
    folder = os.environ["LAUNCH_STUBS"]
    with open(f"{folder}/calls.jsonl", "a") as calls:
        calls.write(json.dumps([name, *arguments]) + "\n")
    code, output = answer(f"{folder}/answers.json", " ".join([name, *arguments]))
    sys.stdout.write(output)
    if name == "gcloud" and os.path.isdir(f"{folder}/workers"):
        homes = [f"{folder}/workers/{each}" for each in sorted(os.listdir(f"{folder}/workers"))]
        code = code or on_workers(homes, list(arguments))
    return code


def answer(path: str, call: str) -> tuple[int, str]:
    with open(path) as file:
        answers = json.load(file)
    for pattern, left in answers.items():
        if re.search(pattern, call):
            code, output = left[0]
            if len(left) > 1:
                answers[pattern] = left[1:]
                with open(path, "w") as file:
                    json.dump(answers, file)
            return code, output
    return 0, ""


def on_workers(homes: list[str], arguments: list[str]) -> int:
    import shutil
    import subprocess

    for home in homes:
        if "scp" in arguments:
            source, target = arguments[arguments.index("scp") + 1 :][:2]
            shutil.copy(source, f"{home}/{target.split(':', 1)[1]}")
        if "ssh" in arguments:
            command = ["bash", "-c", arguments[arguments.index("--command") + 1]]
            done = subprocess.run(command, cwd=home, env=os.environ | {"HOME": home})
            if done.returncode != 0:
                return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
