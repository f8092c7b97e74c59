"""A page in the browser that shows a student and its teacher side by side: the command serve.

The page only lays out what `comparison` says and does; nothing on it comes from the network.
"""

from __future__ import annotations

import html
import os
import socket
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console
from tyro.conf import Positional, arg

from momatch.cli.parsing import parse
from momatch.cli.running import Running, RunningOptions
from momatch.cli.serve.comparison import (
    ANY,
    MAX_NUM,
    Choice,
    Drawing,
    Outcome,
    caption,
    compare,
    ratio,
    request,
)
from momatch.interop.load import load_any
from momatch.models.request import MAX_STUDENT_STEPS
from momatch.utils import devices
from momatch.utils.errors import UsageError
from momatch.utils.text import alternatives

if TYPE_CHECKING:
    import gradio

LOCAL = ("127.0.0.1", "localhost", "::1")
STYLE = """
.main.fillable { max-width: 1240px !important; margin: 0 auto !important; }
#title h1 { margin: 0.4rem 0 0; }
#title p { margin: 0.2rem 0 0.6rem; opacity: 0.75; }
.side h3 { margin: 0; }
.side p { margin: 0.1rem 0 0; opacity: 0.8; font-variant-numeric: tabular-nums; }
.grid .image-frame, .grid img { width: 100%; max-height: 70vh; }
.grid img { object-fit: contain; image-rendering: pixelated; }
#ratio { text-align: center; font-size: 1.1rem; }
#problem .sentence { border-left: 4px solid #d9822b; background: #d9822b22; padding: 0.7rem 1rem; }
"""


@dataclass(frozen=True)
class ServeArguments:
    """A page in the browser: pictures of a student and of its teacher side by side, from the same noise.

    Attributes:
        runs: folders of runs or of models, or "digits" for the built-in teacher.
        port: of the page's address.
        host: who may open it: 127.0.0.1 is this machine alone, 0.0.0.0 everybody who reaches it.
        running: how networks run.
    """

    runs: Annotated[Positional[tuple[str, ...]], arg(metavar="RUN [RUN ...]")] = ()
    port: int = 7860
    host: str = "127.0.0.1"
    running: RunningOptions = Running()


def serve(arguments: list[str], console: Console) -> None:
    """`momatch serve RUN...`: until Ctrl-C."""
    parsed = parse(ServeArguments, arguments, "serve")
    if not parsed.runs:
        raise UsageError("name what to show: momatch serve RUN ..., a run's folder or digits")
    check_address(parsed.host, parsed.port)
    devices.resolve(parsed.running.device)
    gradio, names = import_gradio(), dict.fromkeys(parsed.runs)
    models = {name: load_any(name) for name in names}
    for name, model in models.items():
        if model.of_tokens:
            raise UsageError(f"{name} makes tokens, and the page shows images; use momatch sample {name}")
    page = build([Choice(name, model, parsed.running) for name, model in models.items()])
    page.queue(default_concurrency_limit=1)
    past_proxies(parsed.host)
    _, address, _ = page.launch(
        server_name=f"[{parsed.host}]" if ":" in parsed.host else parsed.host,
        server_port=parsed.port,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        ssr_mode=False,
        run_history=False,
        footer_links=[],
        theme=gradio.themes.Default(
            primary_hue="blue", font=["system-ui", "sans-serif"], font_mono="monospace"
        ),
        css=STYLE,
    )
    console.print(f"Open {address} in a browser; Ctrl-C stops it.", soft_wrap=True)
    if parsed.host not in LOCAL:
        console.print(f"Everybody who reaches {parsed.host} can use it: there is no password.")
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        page.close(verbose=False)
        console.print("\nstopped")


def import_gradio() -> Any:
    """The library; it is told to send nothing anywhere.

    Raises:
        UsageError: if it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise UsageError(f"{error.name} is not installed; pip install 'momatch[serve]'") from None
    return gradio


def past_proxies(host: str) -> None:
    """Have this process reach its own page directly: gradio looks whether it is up before it goes on."""
    for name in ("NO_PROXY", "no_proxy"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), *LOCAL, host]))


def check_address(host: str, port: int) -> None:
    """Refuse an address that cannot be opened, before anything is loaded.

    Raises:
        UsageError: naming it.
    """
    if not 1 <= port < 2**16:
        raise UsageError(f"--port {port} must lie in 1 … {2**16 - 1}")
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(address)
    except OSError as error:
        raise UsageError(
            f"--host {host} --port {port} cannot be opened ({error.strerror}); give another port, or the "
            "address of this machine"
        ) from None


def build(choices: Sequence[Choice]) -> gradio.Blocks:
    """The page, not yet served.

    Args:
        choices: what can be chosen on it, one or more.

    Raises:
        UsageError: if gradio is not installed.
    """
    gr = import_gradio()
    by_name = {choice.name: choice for choice in choices}
    first = fields(choices[0])
    with gr.Blocks(
        title="momatch", analytics_enabled=False, fill_width=True, delete_cache=(600, 3600)
    ) as page:
        gr.HTML(
            "<h1>momatch</h1><p>A student and its teacher, from the same noise.</p>",
            elem_id="title",
        )
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                name = gr.Dropdown(
                    list(by_name), label="Model", elem_id="run", visible=len(by_name) > 1, filterable=False
                )
                prompt = gr.Textbox(label="Prompt", lines=2, elem_id="prompt", **first["prompt"])
                label = gr.Dropdown(label="Class", elem_id="label", **first["label"])
                with gr.Row():
                    num = gr.Number(label="Pictures", elem_id="num", **first["num"])
                    seed = gr.Number(value=0, label="Seed", info="of the noise", elem_id="seed", min_width=80)
                steps = gr.Number(label="Steps", elem_id="steps", **first["steps"])
                guidance = gr.Slider(
                    0,
                    8,
                    step=0.25,
                    label="Guidance scale",
                    info="0 is none; one less than diffusers' scale",
                    elem_id="guidance",
                    **first["guidance"],
                )
                with_teacher = gr.Checkbox(elem_id="with-teacher", **first["with_teacher"])
                button = gr.Button("Draw", variant="primary", elem_id="draw")
            with gr.Column(scale=5, min_width=320):
                problem = gr.HTML(visible=False, elem_id="problem")
                with gr.Row():
                    with gr.Column(min_width=240):
                        own_caption = gr.HTML(elem_id="own-caption", elem_classes="side", **first["caption"])
                        own = gr.Image(elem_id="own", **_PICTURE)
                    with gr.Column(min_width=240, visible=False) as beside:
                        teacher_caption = gr.HTML(elem_id="teacher-caption", elem_classes="side")
                        teacher = gr.Image(elem_id="teacher", **_PICTURE)
                comparison = gr.HTML(elem_id="ratio", visible=False)
        controls = [prompt, label, num, steps, guidance, with_teacher, own_caption]
        results = [own, own_caption, beside, teacher, teacher_caption, comparison, problem]

        def draw(chosen: str, *values: Any) -> Iterator[list[Any]]:
            for shown in drawn(by_name[chosen], *values):
                yield [gr.update(**update) for update in shown]

        def choose(chosen: str) -> list[Any]:
            return [gr.update(**update) for update in fields(by_name[chosen]).values()] + [
                gr.update(**update) for update in _empty()
            ]

        asked = [name, num, steps, seed, label, prompt, guidance, with_teacher]
        name.change(choose, name, [*controls, own, beside, comparison, problem], show_progress="hidden")
        gr.on(
            [button.click, prompt.submit],
            draw,
            asked,
            results,
            concurrency_id="models",
            concurrency_limit=1,  # one computation at a time; others wait for their turn
            show_progress_on=[own, teacher],
        )
    return page


def fields(choice: Choice) -> dict[str, dict[str, Any]]:
    """What the fields of the page show for a model: the properties of each, in the order of the page."""
    model = choice.model
    own = f"1 to {MAX_STUDENT_STEPS}, made for" if choice.is_student else "its own count is"
    return {
        "prompt": {"visible": choice.text_encoder is not None},
        "label": {
            "choices": choice.labels,
            "value": ANY if choice.labels else None,
            "visible": bool(choice.labels),
        },
        "num": {"value": choice.suggested_num, "info": f"1 to {MAX_NUM}"},
        "steps": {"value": model.steps, "info": f"network calls: {own} {alternatives(model.step_counts)}"},
        "guidance": {"value": 0, "visible": choice.can_be_guided},
        "with_teacher": {
            "value": choice.is_student,
            "visible": choice.is_student,
            "label": "with its teacher, at the teacher's own steps",
        },
        "caption": {"value": side(choice, None)},
    }


def drawn(choice: Choice, *values: Any) -> Iterator[list[dict[str, Any]]]:
    """What the page shows for what its fields hold: the model's pictures first, then the teacher's too.

    Args:
        choice: the model.
        *values: number, steps, seed, class, prompt, guidance scale; and whether the teacher is wanted.
    """
    *asked, with_teacher = values
    try:
        wanted = request(*asked)
    except UsageError as error:
        yield _results(choice, Outcome(problem=str(error)), False)
        return
    for outcome in compare(choice, wanted, with_teacher):
        yield _results(choice, outcome, bool(with_teacher) and choice.is_student)


def side(choice: Choice, drawing: Drawing | None, teacher: bool = False) -> str:
    """The heading of a grid, as HTML."""
    role = "Teacher" if teacher or not choice.is_student else "Student"
    waiting = "is being drawn" if teacher else "nothing drawn yet"
    said = waiting if drawing is None else caption(drawing)
    return f"<h3>{role}</h3><p>{html.escape(said)}</p>"


def _results(choice: Choice, outcome: Outcome, with_teacher: bool) -> list[dict[str, Any]]:
    own, teacher = outcome.own, outcome.teacher
    return [
        {"value": own.grid if own else None},
        {"value": side(choice, own)},
        {"visible": with_teacher and not outcome.problem},
        {"value": teacher.grid if teacher else None},
        {"value": side(choice, teacher, teacher=True)},
        {
            "value": html.escape(ratio(own, teacher)) if own and teacher else "",
            "visible": teacher is not None,
        },
        {
            "value": f'<div class="sentence">{html.escape(outcome.problem)}</div>',
            "visible": bool(outcome.problem),
        },
    ]


def _empty() -> list[dict[str, Any]]:
    return [{"value": None}, {"visible": False}, {"visible": False}, {"visible": False}]


_PICTURE: dict[str, Any] = {
    "show_label": False,
    "elem_classes": "grid",
    "format": "png",
    "interactive": False,
    "buttons": ["download", "fullscreen"],
    "min_width": 200,
}
