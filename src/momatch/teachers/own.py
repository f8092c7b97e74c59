"""Teachers and students that momatch itself made: shipped with the package, or in a run's folder."""

from __future__ import annotations

from pathlib import Path

from momatch.model import Model, ModelError, Student, load_model

ASSETS = Path(__file__).parent.parent / "assets"


def load_teacher(source: str | Path) -> Model:
    """Load a teacher.

    Args:
        source: "digits" for the one that ships with the package; or the folder of a model, or of a run that
            trained one (its `teacher/`).

    Raises:
        ModelError: if there is no usable model.
    """
    if str(source) == "digits":
        return load_model(ASSETS / "digits-teacher")
    return _from_run(Path(source), "teacher")


def load_student(source: str | Path) -> Student:
    """Load a student from its folder or from its run's folder.

    Raises:
        ModelError: if there is no usable model, or it is no student.
    """
    model = _from_run(Path(source), "student")
    if not isinstance(model, Student):
        raise ModelError(f"{source} holds a teacher, not a student; give the folder of a distillation run")
    return model


def load_any(source: str | Path) -> Model:
    """Load whatever model a run ended with: its student, or its teacher.

    Raises:
        ModelError: if there is no usable model.
    """
    path = Path(source)
    if str(source) == "digits":
        return load_teacher("digits")
    distilled = (path / "student").is_dir() or '"kind": "distill"' in _text(path / "config.json")
    return _from_run(path, "student" if distilled else "teacher")


def _from_run(path: Path, part: str) -> Model:
    if (path / "model.json").is_file():
        return load_model(path)
    if part == "student" and (path / "teacher" / "model.json").is_file():
        raise ModelError(
            f"{path} holds a teacher, not a student; distil one: momatch distill RECIPE --teacher {path}"
        )
    if (path / "config.json").is_file() and not (path / part / "model.json").is_file():
        raise ModelError(
            f"the run {path} has no {part} yet; to finish it, run the command again that began it"
        )
    return load_model(path / part if (path / part).is_dir() else path)


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.is_file() else ""
