"""Appearance of the page: theme, style sheet, and what a page's own script does."""

from __future__ import annotations

from typing import Any

import gradio as gr

_FONTS = ("ui-sans-serif", "system-ui", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", "sans-serif")

CSS = """
.gradio-container {width: 100% !important; max-width: 1280px !important; min-width: 0; margin: auto;
  padding: 12px !important}
.gradio-container .app, .gradio-container main, .gradio-container .wrap {min-width: 0; max-width: 100%}
.gradio-container .app {padding: 0 !important}
#layout {display: grid; grid-template-columns: minmax(0, 2fr) minmax(0, 3fr); grid-template-rows: auto 1fr}
#layout > * {min-width: 0 !important}
#right {grid-column: 2; grid-row: 1 / 3}
#settings {grid-column: 1; grid-row: 2}
#head {align-items: center; flex-wrap: wrap; gap: 8px}
#head > * {flex: none !important; min-width: 0 !important} #title {flex: 1 1 160px !important; padding: 0}
#title h1 {font-size: 1.3rem; font-weight: 600; margin: 0}
.heading {padding: 0 !important} .heading h2 {font-size: 1rem; font-weight: 600; margin: 0}
.hint {font-size: 14px} #change img, #steer img {width: 100%; height: 100%; object-fit: contain}
#sees figure {margin: 0} #sees img {width: min(100%, 200px); image-rendering: pixelated}
#sees figcaption {font-size: 14px}
#status [data-testid=status-tracker], #tokens [data-testid=status-tracker] {display: none}
#about {padding: 0 0 4px; font-size: 14px}
#tokens {padding: 0; min-height: 20px; font-size: 14px}
.gradio-container {--body-text-color-subdued: #52525b; --input-placeholder-color: #64646d;
  --block-label-text-color: #3f3f46; --block-info-text-color: #52525b; --primary-500: #4f46e5}
.dark .gradio-container, .dark.gradio-container {--body-text-color-subdued: #c4c4cc;
  --input-placeholder-color: #a8a8b0; --block-label-text-color: #d4d4d8; --block-info-text-color: #c4c4cc}
.warning {color: #92400e} .dark .warning {color: #fcd34d}
#gallery .caption-label, #gallery:has(.empty) {display: none}
#draw, #grid_draw {background: #4338ca; color: #fff}
#delete_yes {background: #b91c1c; color: #fff}
#layout button, #head button {min-height: 26px; min-width: 26px}
#layout input {min-height: 24px} #layout input[type=checkbox] {width: 24px; height: 24px}
#layout input[type=range] {height: 24px}
#examples .paginate, #examples .paginate button {color: var(--body-text-color-subdued); font-size: 14px}
button[role=tab].selected {color: #4338ca !important}
.dark button[role=tab].selected {color: #a5b4fc !important}
.upload-container .or {color: var(--body-text-color-subdued) !important}
@media (max-width: 720px) {
  #top {order: 1} #right {order: 2} #settings {order: 3}
  #layout {display: flex; flex-flow: column nowrap}
  #layout > * {width: 100% !important; max-width: 100%; flex: none}
  #gallery .grid-wrap {max-height: 230px !important; overflow-y: auto}
}
#canvas {width: 100%; min-height: 120px; padding: 0}
#canvas img {width: min(100%, 512px); display: block; margin: 0 auto 8px; border-radius: 8px}
#canvas img.sheet {width: auto; max-width: 100%; border-radius: 0}
#canvas .row {display: flex; flex-wrap: wrap; gap: 8px; justify-content: center}
#canvas .row a {flex: 0 1 min(240px, 46%)} #canvas .row img {width: 100%}
#canvas .empty {border: 1px dashed var(--border-color-primary); border-radius: 8px; padding: 48px 16px;
  text-align: center; color: var(--body-text-color-subdued)}
#canvas .bar {height: 8px; border-radius: 4px; background: var(--border-color-primary); overflow: hidden;
  max-width: 512px; margin: 0 auto}
#canvas .bar div {height: 100%; background: var(--primary-500)}
#status {padding: 0; min-height: 24px} #status p, #ask p {margin: 0; overflow-wrap: anywhere}
#status .error {color: #b91c1c} .dark #status .error {color: #fca5a5}
#facts {padding: 0}
#facts dl {display: grid; grid-template-columns: max-content 1fr; gap: 2px 12px; margin: 8px 0 0;
  font-size: 14px}
#facts dt {color: var(--body-text-color-subdued)} #facts dd {margin: 0; overflow-wrap: anywhere}
#facts nav {display: flex; flex-wrap: wrap; gap: 4px 16px} #facts nav a {line-height: 26px;
  text-decoration: underline; color: #4338ca} .dark #facts nav a {color: #a5b4fc}
#gallery .grid-container {grid-template-columns: repeat(auto-fill, minmax(88px, 1fr)) !important}
#gallery, #gallery .grid-wrap {height: auto !important; min-height: 0 !important}
"""

HEAD = """<script>
(() => {  // the language of the page, before Gradio looks at the browser's; the server reads the cookie
  let language = null;
  try { language = localStorage.getItem("cogview3-language"); } catch {}
  language = language || (/^zh/i.test(navigator.language) ? "zh-CN" : "en");
  Object.defineProperty(Navigator.prototype, "language", {get: () => language});
  Object.defineProperty(Navigator.prototype, "languages", {get: () => [language]});
  document.documentElement.lang = language;
  document.cookie = `cogview3-language=${language}; path=/; SameSite=Lax; max-age=31536000`;
})();
</script>"""

SCRIPT = """() => {
  const id = name => document.getElementById(name);
  const live = id("status");
  if (live) { live.setAttribute("role", "status"); live.setAttribute("aria-live", "polite"); }
  const theme = localStorage.getItem("cogview3-theme");
  if (theme) document.body.classList.toggle("dark", theme === "dark");
  document.addEventListener("keydown", event => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      event.stopPropagation();  // Enter would also turn a checkbox over
      id("draw").click();
    }
    const list = event.target.getAttribute && event.target.getAttribute("aria-expanded") === "true";
    if (event.key === "Escape" && !list) id("cancel").click();  // of an open list it closes the list
  }, true);
  addEventListener("pageshow", event => { if (event.persisted) location.reload(); });  // its stream is gone
}"""

OTHER_LANGUAGE = """() => {
  localStorage.setItem("cogview3-language", navigator.language === "zh-CN" ? "en" : "zh-CN");
  location.reload();
}"""
OTHER_THEME = """() => {
  const dark = document.body.classList.toggle("dark");
  localStorage.setItem("cogview3-theme", dark ? "dark" : "light");
}"""
COPY = """async () => {
  const told = document.querySelector("#facts pre");
  if (!told) return document.querySelector("#status").innerHTML;
  try { await navigator.clipboard.writeText(told.textContent); return told.dataset.done; }
  catch { told.hidden = false; return told.dataset.failed; }
}"""


def theme() -> Any:  # noqa: ANN401 - Gradio has no types
    """Gradio's plain theme in fonts that are on every machine."""
    return gr.themes.Base(primary_hue="indigo", font=_FONTS, font_mono=("ui-monospace", "monospace"))
