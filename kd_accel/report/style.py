"""The page's style sheet: light and dark, for wide and narrow screens and for paper."""

STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --quiet: #57606a; --line: #d5dae0; --page: #fff; --panel: #f6f7f9;
  --right: #1a7f4b; --wrong: #c2410c }
@media screen and (prefers-color-scheme: dark) {
  :root { --text: #e4e7eb; --quiet: #a3acb8; --line: #3a414a; --page: #15181c; --panel: #1e2227;
    --right: #4ac18a; --wrong: #f0883e }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1240px; padding: 1.5rem 1rem 4rem; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 1rem; overflow-wrap: anywhere }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; overflow-wrap: anywhere }
main h2 { padding-top: 1rem; border-top: 1px solid var(--line) }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem }
h4 { font-size: .95rem; margin: 0 0 .5rem; font-weight: 600; overflow-wrap: anywhere }
small { font-size: .8em; font-weight: 400; color: var(--quiet) }
.note { color: var(--quiet); margin: .4rem 0 .8rem; max-width: 75ch }
.swatch { display: inline-block; width: 1.5em; margin-right: .5em; vertical-align: middle }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); gap: .75rem }
.cards article { padding: .8rem 1rem; background: var(--panel); border-radius: 8px; min-width: 0 }
.cards h2 { font-size: 1.05rem; margin: 0 0 .4rem }
.cards p { margin: .25rem 0; font-size: .9rem; overflow-wrap: anywhere }
.cards .score b { font-size: 1.15rem; font-weight: 650 }
.legend { list-style: none; padding: .6rem 0; margin: .75rem 0 0; background: var(--page); display: flex;
  flex-wrap: wrap; gap: .1rem 1.25rem; overflow-wrap: anywhere }
@media (min-width: 700px) { .legend { position: sticky; top: 0; z-index: 1; max-height: 5.5rem; overflow-y: auto } }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: .75rem }
figure { margin: 0; padding: .6rem; background: var(--panel); border-radius: 8px; min-width: 0 }
figcaption { font-size: .85rem; color: var(--quiet); overflow-wrap: anywhere; padding: 0 .25rem }
figcaption code { color: var(--text) }
svg { display: block; width: 100%; height: auto; max-width: 460px }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .35rem .75rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top }
th { font-weight: 600; overflow-wrap: anywhere }
td { min-width: 7rem; max-width: 30rem; overflow-wrap: anywhere }
thead th { vertical-align: bottom; min-width: 6rem; max-width: 14rem }
thead .swatch { display: block; margin: 0 0 .3rem }
thead th.number .swatch { margin-left: auto }
.number, .best { text-align: right }
td.number, td.best { white-space: nowrap; min-width: 5rem }
td.best { font-weight: 700 }
th small, td small { display: block }
th[scope=row] { min-width: 11rem; max-width: 22rem; position: sticky; left: 0; background: var(--page) }
.averages th[scope=row], .averages td { background: var(--panel) }
code, pre { font: 13px/1.45 ui-monospace, "DejaVu Sans Mono", monospace }
pre { overflow-x: auto; padding: .75rem; background: var(--panel); border-radius: 8px }
details { margin: .75rem 0 }
summary { cursor: pointer; padding: .3rem 0; font-weight: 600; overflow-wrap: anywhere }
.query { padding: .8rem 0; border-top: 1px solid var(--line) }
.found { display: flex; gap: 1rem; align-items: flex-start }
.found > div { min-width: 0; flex: 1 }
.found > img { width: 110px; flex: none }
img { display: block; width: 100%; height: auto; border-radius: 4px }
.answers { display: grid; grid-template-columns: repeat(5, minmax(0, 96px)); gap: .3rem .5rem; margin-bottom: .7rem }
.who { margin: 0; font-size: .85rem; overflow-wrap: anywhere; grid-column: 1 / -1 }
.who small { margin-left: .6em }
.answer img { aspect-ratio: 1; object-fit: contain; background: var(--panel); border: 3px solid transparent }
.answer.right img { border-color: var(--right) }
.answer span, .captions span { font-size: .8rem; color: var(--wrong); white-space: nowrap }
.right span { color: var(--right); font-weight: 700 }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 520px), 1fr)); gap: 0 2rem }
.captions { list-style: none; padding: 0; margin: .1rem 0 .7rem; font-size: .88rem; overflow-wrap: anywhere }
.captions .right { font-weight: 600 }
@media (max-width: 699px) {
  .found { display: block }
  .found > img { margin-bottom: .6rem }
  .found > img { width: 160px }
  .answers { grid-template-columns: repeat(5, minmax(0, 1fr)); gap: .3rem }
  table { font-size: .9rem }
  th[scope=row] { min-width: 8rem }
  th, td { padding: .3rem .5rem }
}
@media print {
  :root { color-scheme: light }
  body { max-width: none; padding: 0 }
  .legend { position: static; max-height: none }
  .scroll, pre { overflow: visible }
  figure, article, tr { break-inside: avoid }
  h2, h3, h4 { break-after: avoid }
}
"""
