"""Theme of the page: colors, fonts, CSS, and the status line of a request."""

import html
from typing import Any

import gradio as gr

from bagel_rt.ui.jobs import View

_SANS = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Helvetica Neue", "Arial", "sans-serif")
_MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace")
_ACCENT, _ACCENT_DARK = "#b45309", "#f59e0b"


def theme() -> gr.themes.Base:
    """Paper, ink and one accent color; system fonts, nothing from the network."""
    return gr.themes.Base(
        primary_hue=gr.themes.colors.amber,
        secondary_hue=gr.themes.colors.stone,
        neutral_hue=gr.themes.colors.stone,
        radius_size=gr.themes.sizes.radius_md,
        font=_SANS,
        font_mono=_MONO,
    ).set(
        body_background_fill="#f6f5f1",
        body_background_fill_dark="*neutral_950",
        body_text_color="#24292f",
        color_accent=_ACCENT,
        color_accent_soft="#f1efe8",
        color_accent_soft_dark="*neutral_800",
        border_color_accent_subdued="#e1dfd8",
        border_color_accent_subdued_dark="*neutral_700",
        body_text_color_subdued="#6b7178",
        body_text_color_subdued_dark="*neutral_400",
        block_background_fill="white",
        block_background_fill_dark="*neutral_900",
        block_border_width="1px",
        block_border_color="#e1dfd8",
        block_border_color_dark="*neutral_800",
        block_label_background_fill="white",
        block_label_background_fill_dark="*neutral_900",
        block_label_text_color="*neutral_600",
        block_title_text_color="*neutral_800",
        block_title_text_color_dark="*neutral_200",
        block_title_text_weight="600",
        block_info_text_size="*text_sm",
        block_info_text_color="#6b7178",
        block_info_text_color_dark="*neutral_400",
        block_label_text_weight="600",
        block_shadow="none",
        input_background_fill="*neutral_50",
        input_background_fill_dark="*neutral_950",
        input_border_width="1px",
        input_border_color="#e1dfd8",
        input_border_color_dark="*neutral_800",
        input_border_color_focus=_ACCENT,
        input_border_color_focus_dark=_ACCENT_DARK,
        slider_color=_ACCENT,
        slider_color_dark=_ACCENT_DARK,
        checkbox_background_color_selected=_ACCENT,
        checkbox_border_color_selected=_ACCENT,
        button_primary_background_fill="#24292f",
        button_primary_background_fill_hover="*neutral_700",
        button_primary_border_color="#24292f",
        button_primary_border_color_hover="*neutral_700",
        button_primary_border_color_dark="*neutral_200",
        button_primary_border_color_hover_dark="white",
        button_primary_text_color="white",
        button_primary_background_fill_dark="*neutral_200",
        button_primary_background_fill_hover_dark="white",
        button_primary_text_color_dark="*neutral_900",
        button_secondary_background_fill="white",
        button_secondary_background_fill_hover="*neutral_100",
        button_secondary_border_color="#e1dfd8",
        button_secondary_border_color_dark="*neutral_700",
        button_border_width="1px",
        button_large_text_size="*text_md",
        button_large_text_weight="600",
    )


CSS = """
.gradio-container, .gradio-container > main { width: 100%; }
.gradio-container { max-width: 1240px !important; margin: 0 auto !important; }
.masthead { display: flex; align-items: baseline; gap: 12px; flex-wrap: wrap; }
.masthead h1 { font-size: 22px; font-weight: 700; letter-spacing: -0.01em; margin: 0; }
.masthead span { color: var(--body-text-color-subdued); font-size: 14px; }
.masthead p { flex-basis: 100%; margin: 0; font-size: 14px; }
.bare, .bare > div { padding: 0 !important; }
.note, .hint { font-size: 14px; color: var(--body-text-color-subdued); margin: 0; }
.hint { border-left: 3px solid var(--slider-color); padding-left: 10px; color: var(--body-text-color); }
.task { display: grid !important; gap: 16px; align-items: start; grid-template-rows: auto 1fr;
  grid-template-columns: minmax(0, 5fr) minmax(0, 6fr); grid-template-areas: "request result" "settings result"; }
.task > .request { grid-area: request; }
.task > .result { grid-area: result; }
.task > .settings { grid-area: settings; }
@media (max-width: 768px) {
  .task { grid-template-columns: minmax(0, 1fr); grid-template-rows: none;
    grid-template-areas: "request" "result" "settings"; }
  .result .fitted { height: 90vw !important; }
}
#tasks button[role=tab] { font-weight: 500; }
#tasks button[role=tab][aria-selected=true] { color: var(--body-text-color); font-weight: 600; }
#tasks button[role=tab]::after { background: var(--slider-color) !important; }
.heading h3 { font-size: 13px; font-weight: 600; margin: 10px 2px 0; color: var(--body-text-color-subdued); }
#gallery .grid-wrap, .images .grid-wrap { min-height: 0; padding-top: 36px; overflow-y: auto; }
.dark { color-scheme: dark; } /* scroll bars */
#gallery:has(.preview) .gallery-container { min-height: 480px; }
#ask-answer::before { content: "Answer"; display: block; font-weight: 600; font-size: 14px; margin-bottom: 8px; }
#chat-messages .top-panel { display: none; } /* it clears the shown messages, not the conversation */
#chat-messages button[aria-label=Share] { display: none; } /* it uploads the image to Hugging Face */
.sharp img { box-sizing: border-box; }
.fitted img { object-fit: contain !important; width: 100%; height: 100%; }
.status { min-height: 40px; display: flex; flex-direction: column; justify-content: center; gap: 8px; }
.status .track { height: 4px; border-radius: 2px; background: var(--border-color-primary); overflow: hidden; }
.status .fill { height: 100%; background: var(--slider-color); transition: width 0.15s linear; }
.status .words { display: flex; justify-content: space-between; gap: 16px; font-size: 14px;
  font-variant-numeric: tabular-nums; }
.status .faint { color: var(--body-text-color-subdued); white-space: nowrap; }
.status[data-stage=idle] .faint { white-space: normal; }
.status .message { white-space: pre-line; overflow-wrap: anywhere; }
.status[data-stage=failed] .message { color: #c8373f; }
"""

_STAGES = {"text": "Writing, token", "image": "Denoising, step"}


def status(view: View[Any], done: str = "", prefix: str = "") -> str:
    """A view as one line of HTML, with a progress bar until the request ends.

    Only the end of a request is announced to screen readers: the line changes many times a second until then.

    Args:
        done: the words of a request that is done.
        prefix: before the words of a running request.
    """
    fraction, words = (view.step / view.total if view.total else 0.0), "Reading the prompt"
    if view.stage == "waiting":
        words = f"Waiting for {view.ahead} other request{'s' * (view.ahead != 1)}" if view.ahead else "Waiting"
    elif view.stage in _STAGES:
        words = f"{prefix}{_STAGES[view.stage]} {view.step} of {'at most ' * (view.stage == 'text')}{view.total}"
    elif view.stage == "cancelled":
        words = f"Cancelled after step {view.step} of {view.total}" if view.total else "Cancelled"
    elif view.stage == "done":
        words = done
    elif view.stage == "failed":
        words = view.error
    bar = (
        f'<div class="track" role="progressbar" aria-label="Progress" aria-valuenow="{100 * fraction:.0f}">'
        f'<div class="fill" style="width: {fraction:.1%}"></div></div>'
    )
    role = {"failed": ' role="alert"', "done": ' role="status"', "cancelled": ' role="status"'}.get(view.stage, "")
    seconds = f"{view.seconds:.1f} s" if view.seconds else ""
    return (
        f'<div class="status"{role} data-stage="{view.stage}">{"" if view.ended else bar}<div class="words">'
        f'<span class="message">{html.escape(words)}</span><span class="faint">{seconds}</span></div></div>'
    )


def idle(words: str) -> str:
    """The status line before the first request."""
    return (
        f'<div class="status" data-stage="idle"><div class="words"><span class="faint">{html.escape(words)}</span>'
        "</div></div>"
    )


def hint(words: str | None) -> Any:
    """The update of the control that shows a hint below the prompt, or nothing."""
    return gr.update(value=f'<p class="hint" role="note">{html.escape(words or "")}</p>', visible=bool(words))


def masthead(name: str, device: str, dtype: str, summary: str) -> str:
    """The header of the page.

    Args:
        summary: one sentence on what the model can do.
    """
    model = html.escape(f"{name} · {dtype} · {device}")
    return f'<div class="masthead"><h1>bagel_rt</h1><span>{model}</span><p>{html.escape(summary)}</p></div>'
