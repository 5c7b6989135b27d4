"""How report.html looks, and what happens on a click: its style and its script, which are inside the page."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --pale: #f3f5f7; --line: #d5dae0; --soft: #57606a;
  --good: #e3f4e8; --accent: #0b6bcb; }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e3e8ee; --paper: #12161c; --pale: #1c222b; --line: #353d48; --soft: #9aa6b2;
    --good: #17351f; --accent: #6cb2ff; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif;
  color: var(--ink); background: var(--paper); overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.2rem; line-height: 1.3; margin: 2.2rem 0 .6rem; }
.facts { color: var(--soft); font-size: .9rem; margin: 0; }
.answer { border-left: .3rem solid var(--accent); padding-left: 1rem; margin: 1.2rem 0; }
.answer p { margin: .6rem 0 0; }
.answer p:first-child { margin: 0; font-size: clamp(1.2rem, 2.4vw, 1.5rem); line-height: 1.35; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: .9rem; margin-top: 1.2rem; }
nav a { color: var(--accent); }
.wide { overflow: auto; max-width: max-content; }
.tall { max-height: 85vh; border: 1px solid var(--line); }
/* What is cut off fades away. */
.below::after { content: ""; display: block; position: sticky; bottom: 0; left: 0; z-index: 3; height: 2.5rem;
  margin-top: -2.5rem; pointer-events: none; background: linear-gradient(transparent, var(--paper)); }
.hint, .sorted { color: var(--soft); font-size: .85rem; margin: .2rem 0; }
table { border-collapse: separate; border-spacing: 0; font-size: .9rem; font-variant-numeric: tabular-nums;
  overflow-wrap: normal; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap;
  background: var(--paper); }
th { background: var(--pale); position: sticky; top: 0; z-index: 1; }
th:first-child, td:first-child { position: sticky; left: 0; }
th:first-child { z-index: 2; }
td:has(b) { background: var(--good); }
th button { all: unset; cursor: pointer; }
th button:focus-visible, .plot:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
th button::after { content: " ↕"; color: var(--soft); }
.few th:not([aria-sort]) button::after { content: none; }
th[aria-sort=ascending] button::after { content: " ▲"; color: inherit; }
th[aria-sort=descending] button::after { content: " ▼"; color: inherit; }
.number { text-align: right; }
.whole { white-space: nowrap; }
.words { white-space: normal; min-width: 20rem; }
.long { white-space: normal; overflow-wrap: anywhere; min-width: 14rem; }
.columns { display: flex; flex-wrap: wrap; gap: .2rem 1rem; border: 0; padding: 0; margin: .5rem 0; font-size: .85rem; }
.columns label { display: inline-flex; align-items: center; gap: .3rem; white-space: nowrap; }
.columns legend { float: left; padding: 0; margin-right: 1rem; color: var(--soft); }
dl { display: grid; grid-template-columns: fit-content(40%) 1fr; gap: .2rem 1rem; margin: 0 0 .6rem; }
dt { color: var(--soft); } dd { margin: 0; }
ul { padding-left: 1.2rem; color: var(--soft); font-size: .9rem; }
.command { display: flex; gap: .5rem; align-items: stretch; margin: .6rem 0; }
pre { flex: 1; min-width: 0; margin: 0; background: var(--pale); padding: .5rem .7rem; font-size: .85rem;
  white-space: pre-wrap; }
pre span { display: inline-block; max-width: 100%; }
.copy { font: inherit; font-size: .85rem; padding: 0 .8rem; cursor: pointer; color: var(--ink); background: var(--pale);
  border: 1px solid var(--line); border-radius: .3rem; }
figure { margin: 1.5rem 0; }
.plot { all: unset; display: block; cursor: zoom-in; width: 100%; max-width: 58rem; }
.plot img { display: block; width: 100%; border-radius: 6px; }
.light { background: #fff; }
img.night { display: none; }
dialog { max-width: 98vw; max-height: 96vh; padding: .5rem; border: 1px solid var(--line); background: var(--paper);
  cursor: zoom-out; }
dialog img { width: max(94vw, 70rem); max-width: none; }
@media screen and (prefers-color-scheme: dark) { img.day { display: none; } img.night { display: block; } }
@media (max-width: 40rem) {
  body { padding: .8rem; } h1 { font-size: 1.25rem; }
  th, td { padding: .3rem .45rem; } table { font-size: .85rem; }
  .command { flex-direction: column; } .copy { align-self: start; padding: .2rem .8rem; }
}
@page { size: A4; margin: 12mm; }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav, .copy, .hint, .sorted, .columns, .below::after { display: none; }
  th button { display: contents; } th button::after { content: none !important; }
  h2, dl { break-after: avoid; } .command, dl, li { break-inside: avoid; }
  .wide, .tall { overflow: visible; max-height: none; max-width: none; border: 0; }
  .wide:not(.tall), .wide:not(.tall) table { break-inside: avoid; }
  table { font-size: 8pt; } tr { break-inside: avoid; } thead { display: table-header-group; }
  th, td { position: static !important; padding: .1rem .35rem; white-space: normal; }
  .words { min-width: 0; } .long { min-width: 8rem; } td.number { white-space: nowrap; }
  /* Three on a page, so that what is left of one is never half of it. */
  figure { break-inside: avoid; margin: 2mm 0; }
  .plot img { max-height: 84mm; object-fit: contain; object-position: left; }
  .high .plot img { max-height: 170mm; }
}
"""

# A click on a heading sorts by the number that a cell begins with, else by its text, the best first; what is unknown
# stays last. A click on a plot opens it large.
SCRIPT = """
for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => {
  const head = button.parentElement, table = head.closest("table"), body = table.tBodies[0];
  const numeric = head.classList.contains("number");
  const before = head.getAttribute("aria-sort");
  const up = before ? before === "descending" : head.dataset.first !== "descending";
  for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const key = row => {
    const text = row.cells[head.cellIndex].textContent;
    return numeric ? parseFloat(text.replace(/^\\D*?(?=[-\\d.])/, "")) : text;
  };
  const unknown = value => value === "" || Number.isNaN(value);
  const order = (a, b) => numeric ? a - b : a.localeCompare(b, undefined, { numeric: true });
  const rows = [...body.rows].map(row => [key(row), row]);
  rows.sort(([a], [b]) => unknown(a) - unknown(b) || (unknown(a) ? 0 : up ? order(a, b) : order(b, a)));
  body.append(...rows.map(pair => pair[1]));
  const words = numeric ? ["lowest first", "highest first"] : ["A to Z", "Z to A"];
  table.parentElement.nextElementSibling.textContent = `Sorted by ${button.textContent}, ${words[up ? 0 : 1]}.`;
});
for (const wide of document.querySelectorAll(".wide")) {
  const hint = wide.previousElementSibling;
  const show = () => {
    const left = wide.scrollWidth - wide.clientWidth - wide.scrollLeft;
    const below = wide.scrollHeight - wide.clientHeight - wide.scrollTop;
    const isWide = wide.scrollWidth > wide.clientWidth + 1, isTall = wide.scrollHeight > wide.clientHeight + 1;
    const words = [];
    if (isTall) words.push(below < 2 ? "the last rows, more above ↑" : "more rows below ↓");
    if (isWide) words.push(left < 2 ? "more columns to the left ←" : "more columns to the right →");
    const rows = `${wide.querySelectorAll("tbody tr").length} rows`;
    hint.hidden = !words.length;
    hint.textContent = `Scroll the table: ${[...(isTall ? [rows] : []), ...words].join(", ")}`;
    wide.classList.toggle("below", isTall && below >= 2);
    if (words.length) wide.tabIndex = 0; else wide.removeAttribute("tabindex");
  };
  wide.addEventListener("scroll", show);
  new ResizeObserver(show).observe(wide.firstElementChild);
  new ResizeObserver(show).observe(wide);
}
for (const button of document.querySelectorAll(".copy")) button.addEventListener("click", async () => {
  const text = button.previousElementSibling;
  getSelection().selectAllChildren(text);
  try { await navigator.clipboard.writeText(text.textContent); button.textContent = "Copied"; }
  catch { button.textContent = "Selected: press Ctrl+C"; }
});
const large = document.querySelector("dialog");
for (const plot of document.querySelectorAll(".plot")) plot.addEventListener("click", () => {
  large.replaceChildren(...[...plot.children].map(image => image.cloneNode()));
  large.showModal();
});
large.addEventListener("click", () => large.close());
"""
