"""Mistakes in a command line that are to be told before anything heavy is imported: what is typed, and what is said.

In a folder that holds `folder/`, `file.txt`, and `model/` with a config.json, a litconvert.json and a recipe.yaml.
"""

from pathlib import Path

MISTAKES: tuple[tuple[tuple[str, ...], str], ...] = (
    # a name or a place
    (("run", "digitz"), "did you mean 'digits'?"),
    (("run", "nowhere.pt"), "nowhere.pt: no such file or folder"),
    (("run", "my/own.yaml"), "no recipe 'my/own.yaml'"),
    (("run", "digits", "--source", "nowhere.pt"), "nowhere.pt: no such file or folder"),
    (("convert", "nowhere.pt", "out"), "nowhere.pt: no such file or folder"),
    (("convert", "asset:dit-digitz", "out"), "there are asset:dit-digits"),
    (("convert", "asset:dit-digits", "out", "--recipe", "digitz"), "did you mean 'digits'?"),
    (("convert", "asset:dit-digits", "out", "--embeddings", "nowhere.safetensors"), "no such file"),
    (("plan", "a/b/c"), "a/b/c: no such file or folder"),
    (("inspect", "nowhere/"), "nowhere/: no such file or folder"),
    (("distill", "nowhere", "run"), "nowhere: not a model directory of litconvert; convert a checkpoint first"),
    (("distill", "model", "run", "--data", "nowhere"), "nowhere: no such data set; draw one with"),
    (("train", "run", "--recipe", "digits-techer"), "did you mean 'digits-teacher'?"),
    (("train", "run", "--recipe", "digits-teacher", "--data", "nowhere"), "nowhere: no such data set"),
    (("sample", "nowhere.pt"), "nowhere.pt: no such file or folder"),
    (("sample", "model", "--teacher", "nowhere.pt"), "nowhere.pt: no such file or folder"),
    (("sample", "model", "--embeddings", "nowhere.safetensors"), "nowhere.safetensors: no such file"),
    (("evaluate", "nowhere"), "nowhere: no such folder"),
    (("evaluate", "folder"), "folder: not a run of `litconvert distill`"),
    (("probe", "nowhere"), "nowhere: no such folder"),
    (("latents", "encode", "no where", "data", "--recipe", "digits"), "no where: no such file or folder"),
    (("latents", "show", "nowhere"), "nowhere: no such data set"),
    (("recipes", "show", "digitz"), "did you mean 'digits'?"),
    (("push", "nowhere", "me/lit"), "nowhere: no such folder"),
    # one thing for another
    (("push", "me/lit", "model"), "the folder comes first: litconvert push model me/lit"),
    (("push", "model", "lit"), "write it as owner/name"),
    (("distill", "file.txt", "run"), "file.txt: not a model directory of litconvert"),
    (("convert", "asset:dit-digits", "file.txt"), "file.txt exists and is a file, and a folder is written"),
    (("convert", "asset:dit-digits", "out", "--embeddings", "folder"), "folder is a folder, and a file is asked for"),
    (("sample", "model", "--out", "folder"), "folder is a folder, and a file is written"),
    (("sample", "model", "--npz", "folder"), "folder is a folder, and a file is written"),
    (("latents", "show", "folder", "--out", "folder"), "folder is a folder, and a file is written"),
    (("latents", "show", "file.txt"), "file.txt: is a file, and no data set"),
    (
        ("latents", "synthesize", "file.txt", "--recipe", "digits"),
        "file.txt exists and is a file, and a folder is written",
    ),
    (("probe", "model", "--write", "folder"), "folder is a folder, and a file is written"),
    (("env", "--check", "--out", "folder"), "folder is a folder, and a file is written"),
    (("demo", "--out", "file.txt"), "file.txt exists and is a file, and a folder is written"),
    (("sample", "model", "--out", "samples.gif"), "a picture is written as .png, .jpg, .jpeg, .webp"),
    (("latents", "show", "folder", "--out", "sheet"), "a picture is written as .png"),
    # a number or a key
    (("sample", "model", "--steps", "0"), "greater than or equal to 1"),
    (("sample", "model", "--num", "0"), "greater than or equal to 1"),
    (("sample", "model", "--scheduler", "euler"), "sample.scheduler: input should be 'ddpm', 'ddim', 'dpm-solver++'"),
    (("sample", "model", "--set", "sample.stepz=3"), "sample.stepz: unknown key (did you mean 'steps'?)"),
    (("probe", "model", "--num-samples", "0"), "greater than or equal to 1"),
    (("latents", "show", "folder", "--num", "0"), "greater than or equal to 1"),
    (("plan", "asset:dit-digits", "--stage", "all"), "--stage is of a recipe's stages"),
    (("plan", "asset:dit-digits", "-r", "digits", "--stage", "all", "--processes", "0"), "greater than or equal to 1"),
    (("plan", "asset:dit-digits", "-r", "digits", "--stage", "last"), "--stage last: give the number of a stage"),
    (("convert", "asset:dit-digits", "out", "--to", "onnx"), "'onnx' is not one of 'original', 'diffusers'"),
    (("convert", "asset:dit-digits", "out", "--set", "studnet.dtype=float32"), "did you mean 'student'?"),
    (("convert", "asset:dit-digits", "out", "--set", "student.dtype"), "write it as key=value"),
    (("convert", "file.txt", "out", "--set", "studnet.dtype=float32"), "did you mean 'student'?"),
    (("convert", "asset:dit-digits", "out", "--inherit", "q,x"), "a combination of q, k, v and o"),
    (("convert", "asset:dit-digits", "out", "--no-solve", "--data", "folder"), "--no-solve solves nothing"),
    (("run", "digits", "--set", "distill.stages.0.steps=0"), "greater than 0"),
    (("distill", "model", "run", "--set", "distill.stages.1.steps=5"), "is a list that holds 0 to 0"),
    (("train", "run", "-r", "digits-teacher", "--set", "seed=one"), "seed"),
    (("demo", "--set", "sample.steps=none"), "sample.steps"),
    (("convert", "asset:dit-digits", "out", "--device", "gpu"), "'gpu' is not one of 'cuda', 'mps', 'cpu', 'auto'"),
    (("latents", "encode", "folder", "data"), "--recipe or --source says which model the data is for"),
)


def make_place(folder: Path) -> None:
    """The files that the mistakes are about."""
    (folder / "folder").mkdir()
    (folder / "file.txt").write_text("no recipe\n")
    model = folder / "model"
    model.mkdir()
    for name in ("config.json", "litconvert.json"):
        (model / name).write_text("{}\n")
    (model / "recipe.yaml").write_text(
        "distill: {stages: [{objective: hybrid, steps: 1, batch_size: 1, learning_rate: 1.0e-4}]}\n"
    )
