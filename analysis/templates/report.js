"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const columns = data.columns;
  const total = columns.key.length;
  const measures = new Map(data.measures.map((m) => [m.name, m]));
  const names = { dataset: "dataset", model: "model", loss: "loss", batch_size: "batch size",
    max_seq_len: "sequence length", num_negatives: "negatives", seed: "seed", status: "status", key: "run" };
  const memory = "peak_train_memory_bytes";
  const quality = "ndcg_at_10";
  const palette = ["#0173b2", "#de8f05", "#029e73", "#d55e00", "#cc78bc", "#ca9161", "#fbafe4", "#949494"];
  const ordinals = {
    light: ["#a8db34", "#4ac16d", "#1fa187", "#277f8e", "#365c8d", "#46327e", "#440154"],
    dark: ["#fde725", "#addc30", "#5ec962", "#28ae80", "#2c9aa5", "#6b93d6", "#a78bda"],
  };
  const pageSize = 50;
  const hidden = new Map(Object.keys(data.brushes).map((name) => [name, new Set()]));
  const state = { x: measures.has(memory) ? memory : data.measures[0].name,
    y: measures.has(quality) ? quality : data.measures[0].name, color: "batch_size",
    sort: measures.has(quality) ? quality : "key", descending: true, page: 0, budget: Infinity };
  const element = (id) => document.getElementById(id);
  const show = (value, name) => value === null || value === undefined
    ? (name === "num_negatives" ? "all" : "–") : String(value);
  const format = (value) => value === null ? "–" : Number(value.toPrecision(4)).toString();

  const matches = (row) => {
    for (const [name, values] of hidden) if (values.has(columns[name][row])) return false;
    return true;
  };
  const command = (row) => {
    const word = (name) => columns[name][row] === null ? "" : ` --${name.replaceAll("_", "-")} ${columns[name][row]}`;
    return "srsweep train" + ["dataset", "model", "loss", "batch_size", "max_seq_len", "num_negatives", "seed"]
      .map(word).join("") + data.tails[data.tail[row]];
  };
  const escape = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;");
  const wrap = (text, width = 70) => {
    const lines = [""];
    for (const word of text.split(" ")) {
      if (lines[lines.length - 1].length + word.length > width) lines.push("");
      lines[lines.length - 1] += (lines[lines.length - 1] ? " " : "") + word;
    }
    return lines.map(escape).join("<br>");
  };
  const hover = (row) => [`<b>${columns.key[row]}</b>  ${escape(columns.dataset[row])}`,
    `${columns.loss[row]}, batch size ${columns.batch_size[row]}, length ${columns.max_seq_len[row]}, negatives ${show(columns.num_negatives[row], "num_negatives")}`,
    ...[...new Set([state.x, state.y])].map((name) => `${measures.get(name).label}: ${show(columns[name][row])}`),
    wrap(command(row))].join("<br>");

  const token = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const layout = () => ({
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: token("--fg") },
    margin: { l: 64, r: 12, t: 12, b: 52 }, hovermode: "closest", legend: { orientation: "v" },
    hoverlabel: { align: "left", font: { size: 12 } },
    xaxis: axis(state.x), yaxis: axis(state.y), shapes: budgetLine(),
  });
  const axis = (name) => {
    const values = columns[name].filter((v) => v !== null && v > 0);
    const wide = !measures.get(name).maximise && values.length && Math.max(...values) / Math.min(...values) > 8;
    return { title: { text: measures.get(name).label }, type: wide ? "log" : "linear",
      gridcolor: token("--grid"), zerolinecolor: token("--grid"), automargin: true,
      ...(wide ? logTicks(Math.min(...values), Math.max(...values)) : {}) };
  };
  const logTicks = (low, high) => {
    const decades = Math.log10(high / low);
    const steps = decades < 2.5 ? [1, 2, 5] : decades < 4 ? [1, 3] : [1];
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1) {
      for (const step of steps) found.push(Number((step * 10 ** power).toPrecision(3)));
    }
    return { tickvals: found, ticktext: found.map(String) };
  };
  const budgetLine = () => state.x !== memory || !Number.isFinite(state.budget) ? [] : [{ type: "line", xref: "x",
    yref: "paper", x0: state.budget, x1: state.budget, y0: 0, y1: 1, line: { color: token("--accent"), width: 1.5, dash: "dot" } }];

  const traces = (rows) => {
    const values = data.brushes[state.color];
    const numbers = values.filter((v) => typeof v === "number");
    const ordinal = ordinals[document.documentElement.dataset.theme] || ordinals.light;
    const colorOf = (value) => {
      const place = numbers.indexOf(value);
      if (place >= 0) return ordinal[Math.round(place * (ordinal.length - 1) / Math.max(1, numbers.length - 1))];
      return value === null ? "#777777" : palette[values.indexOf(value) % palette.length];
    };
    const groups = new Map(values.map((value) => [value, []]));
    for (const row of rows) {
      if (columns[state.x][row] !== null && columns[state.y][row] !== null) groups.get(columns[state.color][row]).push(row);
    }
    const kind = total > 3000 ? "scattergl" : "scatter";
    return [...groups].filter(([, group]) => group.length).map(([value, group]) => ({
      type: kind, mode: "markers", name: `${names[state.color]} ${show(value, state.color)}`,
      x: group.map((row) => columns[state.x][row]), y: group.map((row) => columns[state.y][row]),
      text: group.map(hover), customdata: group, hovertemplate: "%{text}<extra></extra>",
      marker: { color: colorOf(value), line: { width: 0.4, color: token("--bg") }, opacity: 0.85,
        size: group.map((row) => 5 + 2 * Math.max(0, Math.log2(columns.max_seq_len[row] / 16) / 1.6)),
        symbol: group.map((row) => columns.num_negatives[row] === null ? "star" : "circle") },
    }));
  };

  const budgetSteps = columns[memory] ? [...new Set(columns[memory].filter((v) => v !== null))].sort((a, b) => a - b) : [];
  const best = (rows) => {
    const found = new Map();
    for (const row of rows) {
      const cost = columns[memory] && columns[memory][row];
      const value = columns[quality] && columns[quality][row];
      if (cost === null || cost === undefined || value === null || value === undefined || cost > state.budget) continue;
      const dataset = columns.dataset[row];
      if (!found.has(dataset) || columns[quality][found.get(dataset)] < value) found.set(dataset, row);
    }
    return found;
  };
  const showBudget = (rows) => {
    if (!budgetSteps.length || !columns[quality]) {
      element("best").textContent = "No run has both memory and NDCG@10.";
      return;
    }
    element("budget-value").textContent = Number.isFinite(state.budget) ? `${format(state.budget)} GiB` : "no limit";
    element("budget").setAttribute("aria-valuetext", element("budget-value").textContent);
    const found = best(rows);
    const cells = [...found].map(([dataset, row]) => `<tr><th scope="row">${escape(dataset)}</th><td class="number">${show(columns[quality][row])}</td>` +
      `<td class="number">${show(columns[memory][row])}</td><td>${escape(columns.loss[row])}, bs ${columns.batch_size[row]}, sl ${columns.max_seq_len[row]}, ns ${show(columns.num_negatives[row], "num_negatives")}</td><td><code>${escape(command(row))}</code></td></tr>`);
    element("best").innerHTML = cells.length
      ? `<table><caption>Best run within the budget</caption><thead><tr><th scope="col">Dataset</th><th scope="col">NDCG@10</th><th scope="col">GiB</th><th scope="col">Settings</th><th scope="col">Command</th></tr></thead><tbody>${cells.join("")}</tbody></table>`
      : "No shown run keeps this budget.";
  };

  const tableColumns = ["key", "dataset", "model", "loss", "batch_size", "max_seq_len", "num_negatives", "seed", "status",
    ...data.measures.map((m) => m.name)];
  const label = (name) => names[name] || measures.get(name).label;
  const compare = (a, b) => {
    const x = columns[state.sort][a], y = columns[state.sort][b];
    if (x === y) return a - b;
    if (x === null) return 1;
    if (y === null) return -1;
    return (x < y ? -1 : 1) * (state.descending ? -1 : 1);
  };
  const showHead = () => {
    element("table").tHead.innerHTML = `<tr>${tableColumns.map((name) => `<th scope="col" aria-sort="${state.sort === name ? (state.descending ? "descending" : "ascending") : "none"}"><button type="button" data-column="${name}">${escape(label(name))}${state.sort === name ? (state.descending ? " ▼" : " ▲") : ""}</button></th>`).join("")}<th scope="col">Command</th></tr>`;
  };
  const showTable = (rows) => {
    const sorted = [...rows].sort(compare);
    const pages = Math.max(1, Math.ceil(sorted.length / pageSize));
    state.page = Math.min(state.page, pages - 1);
    const visible = sorted.slice(state.page * pageSize, (state.page + 1) * pageSize);
    element("table").tBodies[0].innerHTML = visible.map((row) => `<tr>${tableColumns.map((name) => {
      const value = columns[name][row];
      return `<td${typeof value === "number" ? ' class="number"' : ""}>${escape(show(value, name))}</td>`;
    }).join("")}<td><code>${escape(command(row))}</code></td></tr>`).join("");
    element("where").textContent = `Page ${state.page + 1} of ${pages}`;
    element("previous").disabled = state.page === 0;
    element("next").disabled = state.page >= pages - 1;
    element("count").textContent = `${sorted.length} of ${total} runs shown.`;
  };
  let shown = [];
  const update = () => {
    shown = [...Array(total).keys()].filter(matches);
    Plotly.react("scatter", traces(shown), layout(), { responsive: true, displaylogo: false });
    showBudget(shown);
    showHead();
    showTable(shown);
  };

  const options = (id, entries, chosen) => {
    element(id).innerHTML = entries.map(([value, text]) => `<option value="${value}"${value === chosen ? " selected" : ""}>${escape(text)}</option>`).join("");
    element(id).addEventListener("change", (event) => { state[id] = event.target.value; update(); });
  };
  options("x", data.measures.map((m) => [m.name, m.label]), state.x);
  options("y", data.measures.map((m) => [m.name, m.label]), state.y);
  options("color", Object.keys(data.brushes).map((name) => [name, names[name]]), state.color);
  for (const [name, values] of Object.entries(data.brushes)) {
    if (values.length < 2) continue;
    const group = document.createElement("fieldset");
    group.innerHTML = `<legend>${names[name]}</legend>` + values.map((value, place) =>
      `<label><input type="checkbox" checked data-brush="${name}" data-place="${place}"> ${escape(show(value, name))}</label>`).join("");
    element("brushes").append(group);
  }
  element("brushes").addEventListener("change", (event) => {
    const { brush, place } = event.target.dataset;
    const value = data.brushes[brush][Number(place)];
    if (event.target.checked) hidden.get(brush).delete(value); else hidden.get(brush).add(value);
    state.page = 0;
    update();
  });
  element("budget").max = String(budgetSteps.length);
  element("budget").value = String(budgetSteps.length);
  element("budget").disabled = !budgetSteps.length;
  element("budget").addEventListener("input", (event) => {
    const place = Number(event.target.value);
    state.budget = place >= budgetSteps.length ? Infinity : budgetSteps[place];
    showBudget(shown);
    Plotly.relayout("scatter", { shapes: budgetLine() });
  });
  element("table").tHead.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    const name = button.dataset.column;
    state.descending = state.sort === name ? !state.descending : measures.has(name) && measures.get(name).maximise;
    state.sort = name;
    state.page = 0;
    showHead();
    showTable(shown);
    element("table").tHead.querySelector(`[data-column="${name}"]`).focus();
  });
  element("previous").addEventListener("click", () => { state.page -= 1; showTable(shown); });
  element("next").addEventListener("click", () => { state.page += 1; showTable(shown); });
  const theme = (dark) => {
    document.documentElement.dataset.theme = dark ? "dark" : "light";
    element("theme").textContent = dark ? "Light" : "Dark";
    element("theme").setAttribute("aria-pressed", String(dark));
  };
  theme(matchMedia("(prefers-color-scheme: dark)").matches);
  element("theme").addEventListener("click", () => { theme(document.documentElement.dataset.theme !== "dark"); update(); });
  update();
})();
