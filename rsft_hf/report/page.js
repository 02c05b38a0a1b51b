"use strict";
const root = document.documentElement;
const byId = (id) => document.getElementById(id);

// Figures: colours of text, grid and ground follow the theme.
const plots = [...document.querySelectorAll(".plot")];

function themed(layout) {
  const style = getComputedStyle(root);
  const text = style.getPropertyValue("--text").trim();
  const line = style.getPropertyValue("--line").trim();
  const changed = { ...layout, paper_bgcolor: "transparent", plot_bgcolor: "transparent" };
  changed.font = { ...layout.font, color: text, family: "system-ui, sans-serif" };
  changed.legend = { ...layout.legend, orientation: "h", y: 1.12 };
  for (const name of Object.keys(layout).filter((name) => /^[xy]axis/.test(name))) {
    changed[name] = { ...layout[name], gridcolor: line, linecolor: line, zerolinecolor: line, automargin: true };
  }
  return changed;
}

function draw() {
  for (const plot of plots) {
    const { data, layout } = JSON.parse(plot.nextElementSibling.textContent);
    plot.parentElement.classList.toggle("spread", "xaxis3" in layout);
    Plotly.react(plot, data, themed(layout), { responsive: true, displayModeBar: false });
  }
}

byId("theme").addEventListener("click", () => {
  const isDark = getComputedStyle(root).colorScheme === "dark";
  root.dataset.theme = isDark ? "light" : "dark";
  draw();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
draw();

// Candidates: gzipped columns; filters are kept in the address, so that a view can be linked.
const PAGE_SIZE = 25;
const FIELDS = ["search", "round", "verdict", "rule", "minimum", "maximum", "order"];

async function unpacked(text) {
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let place = 0; place < binary.length; place += 1) bytes[place] = binary.charCodeAt(place);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

function fillSelect(select, values) {
  select.append(new Option("any", ""));
  for (const value of [...new Set(values)].filter((value) => value !== null).sort()) select.append(new Option(value));
}

function showBrowser(data) {
  const all = data.text.map((_, place) => place);
  const texts = data.text.map((text) => text.toLowerCase());
  const prompts = data.prompts.map((text) => text.toLowerCase());
  let found = all;
  let page = 0;
  for (const name of ["round", "verdict", "rule"]) fillSelect(byId(name), data[name]);

  function matches(place, wanted) {
    if (wanted.search && !texts[place].includes(wanted.search) && !prompts[data.prompt[place]].includes(wanted.search)) {
      return false;
    }
    if (["round", "verdict", "rule"].some((name) => wanted[name] && data[name][place] !== wanted[name])) return false;
    const reward = data.reward[place];
    if (wanted.minimum !== "" && !(reward !== null && reward >= Number(wanted.minimum))) return false;
    return wanted.maximum === "" || (reward !== null && reward <= Number(wanted.maximum));
  }

  function ordered(places, order) {
    const worst = order === "highest" ? -Infinity : Infinity;
    const reward = (place) => data.reward[place] ?? worst;
    if (order === "highest") return places.sort((a, b) => reward(b) - reward(a) || a - b);
    if (order === "lowest") return places.sort((a, b) => reward(a) - reward(b) || a - b);
    if (order === "longest") return places.sort((a, b) => data.text[b].length - data.text[a].length || a - b);
    return places;
  }

  function filter() {
    const wanted = Object.fromEntries(FIELDS.map((name) => [name, byId(name).value]));
    const kept = new URLSearchParams(Object.entries(wanted).filter(([, value]) => value !== ""));
    history.replaceState(null, "", kept.size ? `#candidates?${kept}` : location.hash.split("?")[0] || "#");
    wanted.search = wanted.search.toLowerCase();
    found = ordered(all.filter((place) => matches(place, wanted)), wanted.order);
    page = 0;
    show();
  }

  function show() {
    const numPages = Math.max(1, Math.ceil(found.length / PAGE_SIZE));
    const rows = found.slice(page * PAGE_SIZE, (page + 1) * PAGE_SIZE).map(row);
    byId("rows").replaceChildren(...rows);
    const number = (count) => count.toLocaleString("en");
    const left = data.text.length < data.total ? `, of ${number(data.total)} in the run` : "";
    byId("count").textContent = `${number(found.length)} of ${number(data.text.length)} candidates${left}`;
    byId("page").textContent = `Page ${page + 1} of ${numPages}`;
    byId("previous").disabled = page === 0;
    byId("next").disabled = page + 1 >= numPages;
  }

  function row(place) {
    const line = document.createElement("tr");
    const verdict = document.createElement("span");
    verdict.className = `verdict ${data.verdict[place] ?? ""}`;
    verdict.textContent = data.verdict[place] ?? "not judged";
    verdict.title = data.rule[place] ?? "";
    const reward = data.reward[place];
    const texts = [data.round[place], data.prompts[data.prompt[place]], data.text[place], reward === null ? "–" : reward.toPrecision(4)];
    for (const [column, text] of texts.entries()) {
      const cell = line.insertCell();
      const content = column === 1 || column === 2 ? cell.appendChild(document.createElement("div")) : cell;
      if (content !== cell) content.className = "text";
      content.textContent = text;
    }
    line.insertCell().append(verdict);
    return line;
  }

  function turn(step) {
    page += step;
    show();
    byId("candidates").scrollIntoView();
  }

  let timer;
  const form = byId("filters");
  form.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(filter, 120); });
  form.addEventListener("reset", () => setTimeout(filter));
  form.addEventListener("submit", (event) => event.preventDefault());
  byId("previous").addEventListener("click", () => turn(-1));
  byId("next").addEventListener("click", () => turn(1));
  const linked = new URLSearchParams(location.hash.split("?")[1] ?? "");
  for (const name of FIELDS) if (linked.has(name)) byId(name).value = linked.get(name);
  filter();
}

const packed = byId("candidates-data");
if (packed) unpacked(packed.textContent).then(showBrowser);
