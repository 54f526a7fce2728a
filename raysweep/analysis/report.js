"use strict";
// Tables: a click on a heading sorts by it; empty keys (missing values) stay last either way.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const numeric = head.classList.contains("num");
    const key = (row) => row.cells[column].dataset.sort;
    const order = (a, b) => (numeric ? key(a) - key(b) : key(a).localeCompare(key(b))) * (up ? 1 : -1);
    const rows = [...table.tBodies[0].rows];
    rows.sort((a, b) => (key(a) === "") - (key(b) === "") || (key(a) === "" ? 0 : order(a, b)));
    table.tBodies[0].append(...rows);
  }));
}
const data = document.getElementById("charts");
if (data) {
  const charts = JSON.parse(data.textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const colors = ["#3b76e8", "#e8743b", "#19a979", "#c04cd0", "#d8a800", "#13a4b4", "#e0425e", "#7b61d9", "#7c8a3a", "#8c6d5a"];
  const axis = ({ title, ...more }) => ({
    gridcolor: css("--line"), linecolor: css("--line"), zeroline: false, automargin: true,
    title: title && { ...title, font: { size: 13 } }, ...more,
  });
  const layout = (x, y, more) => ({
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", colorway: colors,
    font: { color: css("--ink"), family: "system-ui, sans-serif", size: 13 },
    margin: { l: 60, r: 16, t: 28, b: 50 }, hovermode: "closest",
    modebar: { bgcolor: "rgba(0,0,0,0)", color: css("--soft"), activecolor: css("--accent") },
    hoverlabel: { bgcolor: css("--card"), bordercolor: css("--line"), font: { color: css("--ink") }, align: "left" },
    xaxis: axis(x), yaxis: axis(y), ...more,
  });
  const small = matchMedia("(max-width: 640px)").matches;
  const options = { responsive: true, displaylogo: false, displayModeBar: !small, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d", "zoomIn2d", "zoomOut2d"] };
  const dashes = { circle: "solid", square: "dash", diamond: "dot" };
  const hover = "%{text}<extra></extra>";
  // Checkpoints told from the others, by a click on their row or dot.
  const lit = new Set();
  const isLit = (checkpoint) => lit.has(checkpoint);
  const fade = (checkpoints) => checkpoints.map((each) => lit.size && !isLit(each) ? 0.15 : 1);
  const dots = ({ checkpoints, color, symbol }) => ({
    size: checkpoints.map((each) => isLit(each) ? 15 : 10), symbol, color, opacity: fade(checkpoints),
    line: { width: 1, color: css("--card") },
  });
  const faint = (trace) => Math.max(...fade(trace.checkpoints));

  const scatter = () => {
    const { traces, titles, logs } = charts.scatter;
    const chosen = Number(document.getElementById("indicator").value);
    const drawn = traces.map((trace) => ({
      x: trace.x[chosen], y: trace.y, text: trace.text[chosen], hovertemplate: hover, type: "scatter", mode: "markers",
      marker: dots(trace),
      error_x: { type: "data", array: trace.x_error[chosen], thickness: faint(trace), width: 3, color: trace.color },
      error_y: { type: "data", array: trace.y_error, thickness: faint(trace), width: 3, color: trace.color },
    }));
    const shown = drawn.flatMap((trace) => trace.x).filter((x) => x !== null);
    const ratio = Math.max(...shown) / Math.min(...shown);
    // A format of its own: Plotly labels the ticks between powers of ten by their first digit alone.
    // Ticks at 1, 2 and 5 where at least two of them are in sight, and not too many.
    const log = { type: "log", tickformat: "~s", ...(ratio > 7 && ratio < 1e4 ? { dtick: "D2" } : {}) };
    Plotly.react("scatter-chart", drawn, layout(
      { title: { text: titles[chosen] }, ...(logs[chosen] ? log : { type: "linear" }) },
      { title: { text: charts.scatter.y_title } }, { showlegend: false }), options);
  };
  const front = () => {
    const { traces, line, x_title, y_title } = charts.front;
    const drawn = traces.map((trace) => ({
      x: trace.x, y: trace.y, text: trace.text, hovertemplate: hover, type: "scatter", mode: "markers",
      marker: { ...dots(trace), symbol: trace.symbol + (trace.on_front ? "" : "-open") },
    }));
    const joined = { ...line, type: "scatter", mode: "lines", line: { width: 1.5, dash: "dot", color: css("--soft") }, hoverinfo: "skip" };
    Plotly.react("front-chart", [joined, ...drawn], layout(
      { title: { text: x_title } }, { title: { text: y_title } }, { showlegend: false }), options);
  };
  const agreement = () => {
    const drawn = charts.agreement.traces.map((trace, index) => ({
      ...trace, hovertemplate: hover, type: "scatter", mode: "markers",
      marker: { size: 10, symbol: index ? "diamond" : "circle" },
      error_x: { type: "data", symmetric: false, array: trace.above, arrayminus: trace.below, thickness: 1.5, width: 4 },
    }));
    document.getElementById("agreement-chart").style.height = `${120 + 28 * charts.agreement.order.length}px`;
    Plotly.react("agreement-chart", drawn, layout(
      { title: { text: "share of pairs ordered right" }, range: [-0.02, 1.02] },
      { type: "category", categoryorder: "array", categoryarray: charts.agreement.order, range: [-0.7, charts.agreement.order.length - 0.3], tickfont: { size: small ? 11 : 13 } },
      { legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 }, margin: { l: 40, r: 16, t: 36, b: 50 },
        shapes: [{ type: "line", x0: 0.5, x1: 0.5, y0: 0, y1: 1, yref: "paper", line: { dash: "dot", color: css("--soft"), width: 1 } }] }), options);
  };
  const worth = () => {
    const { x, y, above, below, names, text, lines, x_title } = charts.worth;
    const dots = {
      x, y, text: names, hovertext: text, hoverinfo: "text", type: "scatter", mode: "markers+text",
      textposition: x.map((each) => each === Math.max(...x) ? "bottom left" : "top right"),
      textfont: { size: 11, color: css("--soft") }, marker: { size: 10 },
      error_y: { type: "data", symmetric: false, array: above, arrayminus: below, thickness: 1.5, width: 4 },
    };
    Plotly.react("worth-chart", [dots], layout(
      { title: { text: x_title }, type: "log", tickformat: "~g" },
      { title: { text: "share of pairs ordered right" }, range: [-0.02, 1.05] },
      { showlegend: false,
        shapes: lines.map((line, index) => ({ type: "line", xref: "paper", x0: 0, x1: 1, y0: line.y, y1: line.y, line: { dash: index ? "dot" : "dash", color: css("--soft"), width: 1.5 } })),
        annotations: lines.map((line) => ({ text: line.name, showarrow: false, xref: "paper", x: 1, xanchor: "right", y: line.y, yanchor: "bottom", font: { size: 12, color: css("--soft") } })) }), options);
  };
  const reliability = () => {
    const { x, y, shares, text } = charts.reliability;
    const line = { x: [0.5, 1], y: [0.5, 1], type: "scatter", mode: "lines", line: { width: 1.5, dash: "dot", color: css("--soft") }, hoverinfo: "skip" };
    const dots = { x, y, text, hovertemplate: hover, type: "scatter", mode: "markers", marker: { color: colors[0], size: shares.map((share) => 6 + 28 * Math.sqrt(share)) } };
    Plotly.react("reliability-chart", [line, dots], layout(
      { title: { text: "stated probability of the likelier order" }, range: [0.48, 1.02], tickformat: ".0%" },
      { title: { text: "share that was right" }, rangemode: "tozero", tickformat: ".0%" }, { showlegend: false }), options);
  };
  const regret = () => {
    const { lines, x_title, y_title } = charts.regret;
    const drawn = lines.flatMap(({ name, hours, regret, low, high, text }, index) => {
      const color = colors[index % colors.length];
      const band = {
        x: [...hours, ...hours.toReversed()], y: [...high, ...low.toReversed()], type: "scatter", mode: "lines",
        fill: "toself", fillcolor: `${color}1c`, line: { width: 0 }, hoverinfo: "skip", showlegend: false,
      };
      return [band, { name, x: hours, y: regret, text, hovertemplate: hover, type: "scatter", mode: "lines", line: { width: 2, color } }];
    });
    Plotly.react("regret-chart", drawn, layout(
      { title: { text: x_title } }, { title: { text: y_title }, rangemode: "tozero" },
      { legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 } }), options);
  };
  const loss = () => {
    const drawn = charts.loss.traces.map((trace) => ({
      x: trace.x, y: trace.y, text: trace.text, hovertemplate: hover, type: "scatter", mode: "lines",
      opacity: faint(trace), line: { width: 1.7, color: trace.color, dash: dashes[trace.symbol] },
    }));
    Plotly.react("loss-chart", drawn, layout(
      { title: { text: "step" } }, { title: { text: "loss, nats per token" } }, { showlegend: false }), options);
  };
  const steps = () => {
    const { lines, titles, logs, scores, num_fixed, x_title } = charts.steps;
    const select = document.getElementById("score");
    const panels = titles.map((_, index) => index).slice(0, num_fixed);
    if (scores.length) panels.push(num_fixed + Number(select ? select.value : 0));
    const nth = (place) => place ? `${place + 1}` : "";
    const opacity = (line) => (line.faint ? 0.3 : 1) * (line.checkpoints.length ? faint(line) : lit.size ? 0.15 : 1);
    const drawn = panels.flatMap((panel, place) => lines.map((line) => ({
      x: line.x, y: line.y[panel], text: line.text[panel], hovertemplate: hover, type: "scatter",
      mode: line.faint ? "lines" : "lines+markers", opacity: opacity(line), connectgaps: false,
      xaxis: `x${nth(place)}`, yaxis: `y${nth(place)}`,
      line: { width: line.faint ? 1 : 2.2, color: line.color, dash: dashes[line.symbol] },
      marker: { size: 6, symbol: line.symbol, color: line.color },
    })));
    // Side by side, or on a phone one below the other.
    const gap = small ? 0.09 : 0.06, size = (1 - gap * (panels.length - 1)) / panels.length;
    const spans = panels.map((_, place) => [place * (size + gap), place * (size + gap) + size]);
    const axes = Object.fromEntries(panels.flatMap((panel, place) => {
      const [low, high] = spans[small ? panels.length - 1 - place : place];
      const across = { title: small && place < panels.length - 1 ? undefined : { text: x_title } };
      const up = logs[panel] ? { type: "log", tickformat: "~g", nticks: 6 } : {};
      return [
        [`xaxis${nth(place)}`, axis({ ...across, rangemode: "tozero", anchor: `y${nth(place)}`, ...(small ? {} : { domain: [low, high] }) })],
        [`yaxis${nth(place)}`, axis({ ...up, anchor: `x${nth(place)}`, ...(small ? { domain: [low, high] } : {}) })],
      ];
    }));
    const annotations = panels.map((panel, place) => ({
      text: titles[panel], showarrow: false, xref: "paper", yref: "paper", xanchor: "left", yanchor: "bottom",
      x: small ? 0 : spans[place][0], y: small ? spans[panels.length - 1 - place][1] : 1, font: { size: 13, color: css("--soft") },
    }));
    document.getElementById("steps-chart").style.height = small ? `${80 + 220 * panels.length}px` : "";
    Plotly.react("steps-chart", drawn, layout({}, {}, { ...axes, annotations, showlegend: false }), options);
  };
  const painters = { scatter, front, agreement, worth, reliability, regret, steps, loss };
  const draw = () => Object.keys(charts).forEach((name) => painters[name]());
  if (charts.scatter) document.getElementById("indicator").addEventListener("change", scatter);
  document.getElementById("score")?.addEventListener("change", steps);
  dark.addEventListener("change", draw);
  draw();

  const lights = ["scatter", "front", "steps", "loss"].filter((name) => charts[name]);
  const rows = [...document.querySelectorAll("tr[data-checkpoint]")];
  const light = () => {
    rows.forEach((row) => row.classList.toggle("lit", isLit(row.dataset.checkpoint)));
    for (const name of lights) painters[name]();
  };
  for (const row of rows) {
    const { checkpoint } = row.dataset;
    row.addEventListener("click", () => {
      if (!lit.delete(checkpoint)) lit.add(checkpoint);
      light();
    });
  }
  for (const name of lights) {
    const chart = document.getElementById(`${name}-chart`);
    const own = (point) => {
      // The mean of several seeds is of no checkpoint.
      if (name === "steps") return charts.steps.lines[point.curveNumber % charts.steps.lines.length].checkpoints[point.pointNumber];
      const trace = charts[name].traces[point.curveNumber - (name === "front" ? 1 : 0)];
      return name === "loss" ? trace.checkpoints.at(-1) : trace.checkpoints[point.pointNumber];
    };
    // Rows only: to paint the chart anew under its own pointer would make it flicker.
    chart.on("plotly_hover", ({ points }) => {
      rows.forEach((row) => row.classList.toggle("lit", isLit(row.dataset.checkpoint) || row.dataset.checkpoint === own(points[0])));
    });
    chart.on("plotly_unhover", () => rows.forEach((row) => row.classList.toggle("lit", isLit(row.dataset.checkpoint))));
    chart.on("plotly_click", ({ points }) => {
      const checkpoint = own(points[0]);
      if (!checkpoint) return;
      if (!lit.delete(checkpoint)) lit.add(checkpoint);
      light();
    });
  }
}
