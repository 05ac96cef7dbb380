"use strict";
(() => {
  const specs = new Map(JSON.parse(document.getElementById("charts").textContent).map(s => [s.key, s]));
  const night = window.matchMedia("(prefers-color-scheme: dark)");
  const coarse = window.matchMedia("(pointer: coarse)").matches;
  const hidden = new Set();
  const chosen = new Map(); // heat map -> {panel, frame}
  let printing = false;

  const LETTERS = Array.from({length: 92}, (_, i) => String.fromCharCode(35 + i)).filter(c => !"\\\"<>&'".includes(c));
  const CODE = new Map(LETTERS.map((letter, place) => [letter, place - 1]));
  const STATES = ["#eceef1", "#9cc7e4", "#e69f00", "#b3261e"];

  function theme() {
    return night.matches && !printing
      ? {ink: "#e9ebee", soft: "#a2a9b3", line: "#2d323a", paper: "#121418", blank: "#1a1d22"}
      : {ink: "#14171c", soft: "#586069", line: "#e1e4e9", paper: "#ffffff", blank: "#f1f2f5"};
  }

  function size(el) {
    const width = printing ? 660 : el.clientWidth;
    return {width, narrow: width < 520};
  }

  function axis(spec, look) {
    const made = {
      title: {text: spec.title, font: {size: 12.5, color: look.soft}, standoff: 10},
      gridcolor: look.line, linecolor: look.line, zeroline: false, automargin: true,
      tickfont: {size: 11.5, color: look.soft}, fixedrange: coarse, nticks: 7,
    };
    if (spec.kind === "percent") made.tickformat = ".2~%";
    return made;
  }

  function base(el) {
    const look = theme(), {width} = size(el);
    return {
      width, paper_bgcolor: look.paper, plot_bgcolor: look.paper,
      font: {family: getComputedStyle(document.body).fontFamily, color: look.ink, size: 12},
      margin: {l: 48, r: 14, t: 18, b: 44}, showlegend: false,
      hovermode: "closest", dragmode: coarse ? false : "zoom", separators: ".,",
      hoverlabel: {bgcolor: look.blank, bordercolor: look.line, font: {color: look.ink}, align: "left"},
    };
  }

  function plane(spec, el) {
    const look = theme(), layout = base(el), {narrow} = size(el);
    layout.height = printing ? 255 : narrow ? 290 : 350;
    layout.xaxis = axis(spec.x, look);
    layout.yaxis = axis(spec.y, look);
    if (spec.zero) layout.xaxis.rangemode = "tozero";
    const rounds = Math.max(...spec.traces.flatMap(t => t.x));
    if (spec.x.title === "round" && rounds <= 8) Object.assign(layout.xaxis, {tick0: 1, dtick: 1});
    if (spec.x.kind === "percent") layout.xaxis.range = [0, 1];
    const traces = spec.traces.map(t => ({...t, visible: printing || !hidden.has(t.meta)}));
    return [traces, layout];
  }

  function dots(spec, el) {
    const look = theme(), layout = base(el), count = spec.names.length, {narrow} = size(el);
    layout.height = 70 + count * (narrow ? 28 : 32);
    layout.xaxis = {...axis(spec.x, look), nticks: narrow ? 4 : 8};
    layout.yaxis = {
      ...axis(spec.y, look), tickvals: spec.names.map((_, i) => i), ticktext: spec.names.map(n => middle(n, narrow ? 20 : 48)),
      range: [-0.6, count - 0.4], fixedrange: true, tickfont: {size: 13, color: look.ink}, title: {text: ""},
    };
    return [spec.traces, layout];
  }

  function tail(text, most) {
    return text.length > most ? "…" + text.slice(text.length - most + 1) : text;
  }

  function middle(text, most) {
    return text.length > most ? text.slice(0, most / 2 - 1) + "…" + text.slice(text.length - most / 2) : text;
  }

  function names(list, starts, most, width) {
    if (starts.length) {
      const step = Math.ceil(starts.length / most);
      const kept = starts.filter((_, i) => i % step === 0);
      return {tickvals: kept.map(s => s[0]), ticktext: kept.map(s => s[1])};
    }
    const step = Math.max(1, Math.ceil(list.length / most));
    const kept = list.map((_, i) => i).filter(i => i % step === 0);
    return {tickvals: kept, ticktext: kept.map(i => tail(list[i], width))};
  }

  function heat(spec, el) {
    const look = theme(), layout = base(el), {narrow, width} = size(el);
    const at = chosen.get(spec.key), panel = spec.panels[at.panel], frame = panel.frames[at.frame];
    const z = frame.rows.map(row => spec.codes
      ? Array.from(row, c => { const code = CODE.get(c); return code < 0 ? null : spec.codes[code]; }) : row);
    if (spec.categories.length) z.forEach(row => row.forEach((value, i) => { if (value === 0) row[i] = null; })); // blank
    const rows = panel.rows.length, columns = panel.columns.length, states = spec.categories.length > 0;
    const tall = Math.max(Math.min(rows * (rows > 24 ? 15 : 19), 640), 110);
    layout.height = tall + (states ? 76 : 118);
    layout.plot_bgcolor = look.blank;
    layout.margin = {l: 30, r: 12, t: states ? 12 : 54, b: 60};
    layout.xaxis = {
      ...axis(spec.x, look), showgrid: false, ticks: "", nticks: undefined, tickangle: "auto", range: [-0.5, columns - 0.5],
      ...names(panel.columns, panel.starts, Math.floor(width / (panel.starts.length ? 62 : 34)), 14),
    };
    layout.yaxis = {
      ...axis(spec.y, look), showgrid: false, ticks: "", nticks: undefined, range: [rows - 0.5, -0.5],
      ...names(panel.rows, panel.row_starts, Math.floor(tall / 15), narrow ? 16 : 30),
    };
    layout.xaxis.title.standoff = 20;
    const wide = (size, count) => size / count >= 6; // lines between groups would hide narrower cells
    const rule = {line: {color: look.paper, width: 1.5}, type: "line"};
    layout.shapes = [
      ...panel.starts.filter(s => s[0] > 0 && wide(width, columns)).map(s => ({...rule, x0: s[0] - 0.5, x1: s[0] - 0.5, yref: "paper", y0: 0, y1: 1})),
      ...panel.row_starts.filter(s => s[0] > 0 && wide(tall, rows)).map(s => ({...rule, y0: s[0] - 0.5, y1: s[0] - 0.5, xref: "paper", x0: 0, x1: 1})),
    ];
    const percent = spec.value.kind === "percent";
    const hovertext = z.map((row, i) => row.map((value, j) => {
      if (value === null) return "";
      const shown = states ? spec.categories[value] : percent ? (100 * value).toFixed(1) + " %" : String(value);
      return `${panel.rows[i]}<br>${spec.x.title} ${panel.columns[j]}<br><b>${shown}</b> ${states ? "" : spec.value.title}`;
    }));
    const trace = {
      type: "heatmap", z, hovertext, hoverinfo: "text", zmin: 0, zmax: spec.top || 1, hoverongaps: false, xgap: columns < 40 ? 1 : 0, ygap: rows < 40 ? 1 : 0,
      showscale: !states, colorscale: states ? steps() : "Viridis",
      colorbar: {
        orientation: "h", x: 1, xanchor: "right", y: 1, yanchor: "bottom", len: narrow ? 0.7 : 0.32, lenmode: "fraction", thickness: 9, ypad: 6,
        outlinewidth: 0, tickfont: {size: 10.5, color: look.soft}, nticks: 5, tickformat: percent ? ".2~%" : "",
        title: {text: spec.value.title, side: "top", font: {size: 11, color: look.soft}},
      },
    };
    if (!states && rows * columns <= 225 && width / columns > 34) {
      trace.text = z.map(row => row.map(value => !value ? "" : percent ? Math.round(100 * value) : value));
      trace.texttemplate = "%{text}";
      trace.textfont = {size: 10};
    }
    return [[trace], layout];
  }

  function steps() {
    return STATES.flatMap((color, i) => [[i / 4, color], [(i + 1) / 4, color]]);
  }

  const makers = {plane, dots, heat};
  function draw(el) {
    const spec = specs.get(el.dataset.chart), [traces, layout] = makers[spec.kind](spec, el);
    if (spec.categories && spec.categories.length) { traces[0].zmin = -0.5; traces[0].zmax = 3.5; }
    return Plotly.react(el, traces, layout, {displaylogo: false, showSendToCloud: false, typesetMath: false, plotlyServerURL: "", displayModeBar: coarse ? false : "hover", modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"], toImageButtonOptions: {format: "svg", filename: spec.key}});
  }

  const charts = [...document.querySelectorAll(".chart")];
  const drawAll = () => charts.forEach(draw);

  // Heat maps: which run, which round
  charts.map(el => [el, specs.get(el.dataset.chart)]).filter(([, s]) => s.kind === "heat").forEach(([el, spec]) => {
    chosen.set(spec.key, {panel: 0, frame: 0});
    const controls = el.parentElement.querySelector(".controls");
    const select = controls.querySelector("select"), slider = controls.querySelector("input"), output = controls.querySelector(".frame-name");
    controls.hidden = !select && !slider;
    const show = () => {
      const at = chosen.get(spec.key), panel = spec.panels[at.panel], last = panel.frames.length - 1;
      at.frame = Math.min(at.frame, last);
      if (select) controls.querySelector(".chosen").textContent = panel.label;
      if (slider) {
        slider.max = last;
        slider.disabled = last === 0;
        slider.value = at.frame;
        output.textContent = panel.frames[at.frame].label;
        slider.setAttribute("aria-valuetext", panel.frames[at.frame].label);
      }
    };
    if (select) {
      select.append(...spec.panels.map((p, i) => new Option(p.label, i)));
      select.addEventListener("change", () => { chosen.get(spec.key).panel = +select.value; show(); draw(el); });
    }
    if (slider) slider.addEventListener("input", () => { chosen.get(spec.key).frame = +slider.value; show(); draw(el); });
    show();
  });

  // The legend of all charts
  document.querySelectorAll(".legend button").forEach(button => button.addEventListener("click", () => {
    const shown = button.getAttribute("aria-pressed") !== "true", label = button.dataset.label;
    button.setAttribute("aria-pressed", shown);
    if (shown) hidden.delete(label); else hidden.add(label);
    charts.filter(el => specs.get(el.dataset.chart).kind === "plane").forEach(draw);
  }));

  // The table sorts by the column whose button is pressed; what is missing stays at the end
  const table = document.getElementById("table"), body = table.tBodies[0];
  [...table.tHead.rows[0].cells].forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const words = head.classList.contains("name"), before = head.getAttribute("aria-sort");
    const up = before ? before === "descending" : words;
    [...table.tHead.rows[0].cells].forEach(cell => cell.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = row => row.cells[column].dataset.value;
    const order = (a, b) => words ? key(a).localeCompare(key(b), "en") : key(a) - key(b);
    const known = [...body.rows].filter(r => key(r) !== undefined).sort((a, b) => up ? order(a, b) : order(b, a));
    body.append(...known, ...[...body.rows].filter(r => key(r) === undefined));
  }));

  if (window.matchMedia("(max-width: 48rem)").matches) document.querySelector("nav details").open = false;
  night.addEventListener("change", drawAll);
  let wide = window.innerWidth, timer = 0;
  window.addEventListener("resize", () => {
    if (window.innerWidth === wide || printing) return;
    wide = window.innerWidth;
    clearTimeout(timer);
    timer = setTimeout(drawAll, 120);
  });
  window.addEventListener("beforeprint", () => { printing = true; drawAll(); });
  window.addEventListener("afterprint", () => { printing = false; drawAll(); });

  // The first screen at once, the rest when the browser has time
  let next = 0;
  (function some() {
    const until = performance.now() + 40;
    while (next < charts.length && performance.now() < until) draw(charts[next++]);
    if (next < charts.length) setTimeout(some); else document.documentElement.dataset.ready = "yes";
  })();
})();
