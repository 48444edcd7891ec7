"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (name) => document.getElementById(name);
  const make = (tag, kind, text) => {
    const made = document.createElement(tag);
    if (kind) made.className = kind;
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const sections = [...document.querySelectorAll("section.query")];
  const links = [...document.querySelectorAll("nav.queries li a")];
  const place = new Map(data.rows.map((row, at) => [row, at]));
  const words = data.rows.map((_, at) =>
    [data.ids[at], data.texts[at], data.labels[at] || "", ...Object.values(data.columns).map((c) => c[at])].join("\n").toLowerCase());
  const texts = new Map([...document.querySelectorAll("li.row")].map((li) => [li.id, li.querySelector(".text")]));
  const near = new Map([...document.querySelectorAll("li.row")].map((li) => [li.id, [...li.querySelectorAll(".near")]]));
  const PAGE = data.own ? 50 : Math.max(10, ...sections.map((s) => s.querySelectorAll("li.row").length / 2));
  const state = { query: 0, row: null, run: 0, damping: 0, order: "sides", filter: "", more: 0 };
  const decisions = new Map();

  const signed = (value) => {
    const text = Number(value.toPrecision(4)).toString().replace("-", "−");
    return value >= 0 ? "+" + text : text;
  };
  const column = (run = state.run) => {
    const damping = run === state.run ? state.damping : 0;
    const scores = data.runs[run].scores[damping][state.query];
    const [low, high, levels] = data.runs[run].histograms[damping][state.query];
    return { scores, low, high, levels, most: Math.max(-low, high) || 1 };
  };
  const title = (run, damping) => run.dampings.length > 1 ? `${run.name} (damping ${run.dampings[damping]})` : run.name;
  const ranks = (scores) => {
    const order = [...scores.keys()].sort((a, b) => scores[b] - scores[a]);
    const made = [];
    order.forEach((at, rank) => { made[at] = rank + 1; });
    return made;
  };
  const setBar = (bar, share) => {
    const rect = bar.querySelector("rect");
    rect.setAttribute("class", share >= 0 ? "pro" : "con");
    rect.setAttribute("x", Math.min(share, 0));
    rect.setAttribute("width", Math.abs(share));
  };
  const binsPath = (levels) => {
    const step = 100 / levels.length;
    return "M0 24" + [...levels].map((d) => "V" + (24 * (1 - parseInt(d, 36) / 35)).toFixed(2) + "h" + step.toFixed(3)).join("") + "V24z";
  };

  const card = (at, rank, one, others) => {
    const li = $("card").content.firstElementChild.cloneNode(true);
    const row = data.rows[at], score = one.scores[at], id = `q${state.query}-r${row}`;
    const get = (name) => li.querySelector(name);
    li.id = id;
    li.dataset.row = row;
    get(".rank").textContent = rank;
    setBar(get(".bar"), score / one.most);
    get(".score").textContent = signed(score);
    get(".score").className = "score " + (score >= 0 ? "pro" : "con");
    get(".id").href = "#" + id;
    get(".id bdi").textContent = data.ids[at];
    if (data.sources[state.query] === row) get(".badges").append(make("span", "badge known", "known source"));
    const lexical = data.bm25.length ? data.bm25[state.query].indexOf(row) : -1;
    if (lexical >= 0) get(".badges").append(make("span", "badge", "BM25 " + (lexical + 1)));
    get(".place use").setAttribute("href", "#h" + state.query);
    get(".place .here").setAttribute("d", `M${100 * (score - one.low) / (one.high - one.low)} 0V24`);
    const known = texts.get(id);
    if (known) get(".text").replaceWith(known.cloneNode(true));
    else get(".text").textContent = data.texts[at];
    for (const [name, values] of Object.entries(data.columns)) {
      if (!values[at]) continue;
      const cell = make("span", "cell");
      cell.append(make("span", "name", name), " ", make("bdi", "", values[at]));
      get(".more").append(cell, " ");
    }
    for (const other of others) {
      const shown = make("span", "other"), bar = get(".bar").cloneNode(true);
      setBar(bar, other.scores[at] / other.most);
      const beyond = data.depth && other.ranks[at] > data.depth ? "beyond rank " + data.depth : "rank " + other.ranks[at];
      const name = make("span", "name");
      name.append(make("bdi", "", other.name), ", " + beyond);
      shown.append(bar, make("span", "score", signed(other.scores[at])), name);
      get(".others").append(shown);
    }
    const labels = get(".labels");
    if (labels && data.labels.length) {
      labels.prepend("label ", make("b", "", data.labels[at]), data.predicted[row] ? ", the model says " : "", make("b", data.predicted[row] === data.labels[at] ? "" : "con", data.predicted[row] || ""));
    } else if (labels) labels.remove();
    for (const box of li.querySelectorAll("input")) {
      box.value = row;
      box.checked = decisions.get(row) === box.name;
    }
    li.append(...(near.get(id) || []).map((one) => one.cloneNode(true)));
    if (data.images && document.getElementById("t" + row)) {
      const image = document.createElementNS("http://www.w3.org/2000/svg", "svg");
      image.setAttribute("class", "thumb");
      image.setAttribute("viewBox", "0 0 1 1");
      image.setAttribute("role", "img");
      image.setAttribute("aria-label", "the image of row " + data.ids[at]);
      const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
      use.setAttribute("href", "#t" + row);
      image.append(use);
      li.insertBefore(image, li.querySelector(".text"));
    }
    return li;
  };

  const chosen = (one) => {
    const asked = state.filter.toLowerCase().split(/\s+/).filter(Boolean);
    return [...data.rows.keys()].filter((at) => asked.every((word) => words[at].includes(word)));
  };
  const orders = {
    high: (one) => (a, b) => one.scores[b] - one.scores[a],
    low: (one) => (a, b) => one.scores[a] - one.scores[b],
    size: (one) => (a, b) => Math.abs(one.scores[b]) - Math.abs(one.scores[a]),
    id: () => (a, b) => data.ids[a].localeCompare(data.ids[b], undefined, { numeric: true }),
  };
  const unlike = (one, other) => (a, b) =>
    Math.abs(one.scores[b] / one.most - other.scores[b] / other.most) - Math.abs(one.scores[a] / one.most - other.scores[a] / other.most);

  const fill = (side, rows, one, others, title) => {
    const shown = rows.slice(0, PAGE + state.more), list = side.querySelector("ol");
    const rank = ranks(one.scores), low = ranks(one.scores.map((score) => -score));
    list.replaceChildren(...shown.map((at, n) => card(at, title === "All rows" ? rank[at] : n + 1, one, others)));
    side.querySelector("h3").textContent = title;
    side.querySelector(".further").hidden = shown.length === rows.length;
    return shown.length;
  };
  const render = () => {
    const section = sections[state.query], one = column();
    sections.forEach((other) => other.classList.toggle("off", other !== section));
    links.forEach((link, n) => n === state.query ? link.setAttribute("aria-current", "true") : link.removeAttribute("aria-current"));
    const others = data.runs.map((run, n) => n === state.run ? null : { name: title(run, 0), ...column(n) }).filter(Boolean);
    const damped = section.querySelector(".damped");
    if (damped) damped.textContent = data.runs[state.run].dampings[state.damping] || "none";
    others.forEach((other) => { other.ranks = ranks(other.scores); });
    const rows = chosen(one), sides = [...section.querySelectorAll(".side")];
    const both = state.order === "sides";
    section.querySelector(".sides").classList.toggle("one", !both || data.own);
    if (sides[1]) sides[1].classList.toggle("off", !both);
    let shown = 0;
    if (both) {
      const up = rows.filter((at) => one.scores[at] > 0).sort(orders.high(one));
      shown = fill(sides[0], up, one, others, data.own ? "The most suspicious rows" : "Proponents");
      if (sides[1]) shown += fill(sides[1], rows.filter((at) => one.scores[at] < 0).sort(orders.low(one)), one, others, "Opponents");
    } else {
      const by = orders[state.order] ? orders[state.order](one) : unlike(one, column(Number(state.order.slice(6))));
      shown = fill(sides[0], rows.sort(by), one, others, "All rows");
    }
    $("told").textContent = `${shown.toLocaleString("en")} of ${rows.length.toLocaleString("en")} rows`;
    section.querySelector(".bins").setAttribute("d", binsPath(one.levels));
    const ends = section.querySelectorAll(".all .ends span");
    ends[0].textContent = signed(one.low);
    ends[2].textContent = signed(one.high);
    section.querySelector(".all .axis").setAttribute("d", `M${100 * -one.low / (one.high - one.low)} 0V24`);
    section.querySelector(".rug").classList.toggle("off", state.run + state.damping > 0);
    mark();
  };

  const LETTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz-";
  const heat = (section) => {
    const svg = section.querySelector(".heat"), found = data.heat && data.heat.cells[`${state.query}-${state.row}`];
    if (!svg || !found) return;
    const cells = svg.querySelector(".cells"), wide = data.heat.columns.length;
    cells.replaceChildren(cells.firstElementChild);
    [...found[1]].forEach((letter, n) => {
      const level = LETTERS.indexOf(letter) - 31;
      if (!level) return;
      const square = document.createElementNS("http://www.w3.org/2000/svg", "path");
      square.setAttribute("class", level > 0 ? "pro" : "con");
      square.setAttribute("fill-opacity", Math.abs(level) / 31);
      square.setAttribute("d", `M${n % wide} ${Math.floor(n / wide)}h1v1h-1z`);
      cells.append(square);
    });
    section.querySelector(".blocks .of").textContent = data.ids[place.get(state.row)];
  };
  const mark = () => {
    const section = sections[state.query], one = column(), at = place.get(state.row);
    section.querySelectorAll("li.row").forEach((li) => li.classList.toggle("now", Number(li.dataset.row) === state.row));
    section.querySelectorAll(".lines polyline").forEach((line) => line.classList.toggle("now", Number(line.dataset.row) === state.row));
    const here = at === undefined ? "" : `M${100 * (one.scores[at] - one.low) / (one.high - one.low)} 0V24`;
    section.querySelector(".histogram > .here").setAttribute("d", here);
    if (at !== undefined) heat(section);
  };
  const go = (query, row, focus) => {
    if (query < 0 || query >= sections.length) return;
    const other = query !== state.query;
    Object.assign(state, { query, row, more: other ? 0 : state.more });
    if (other) render(); else mark();
    history.replaceState(null, "", row === null ? `#q${query}` : `#q${query}-r${row}`);
    const li = row !== null && document.getElementById(`q${query}-r${row}`);
    if (li && focus) li.querySelector(".id").focus({ preventScroll: true });
    if (li && focus) li.scrollIntoView({ block: "nearest" });
    else if (other) links[query].scrollIntoView({ block: "nearest" });
  };
  const read = () => {
    const found = /^#q(\d+)(?:-r(\d+))?$/.exec(location.hash);
    if (!found || Number(found[1]) >= sections.length) return;
    const row = found[2] === undefined || !place.has(Number(found[2])) ? null : Number(found[2]);
    state.query = Number(found[1]);
    state.row = row;
    if (row !== null && !document.getElementById(`q${state.query}-r${row}`)) {
      Object.assign(state, { filter: data.ids[place.get(row)], order: "high" });
      $("filter").value = state.filter;
      $("order").value = "high";
    }
    render();
    const li = row !== null && document.getElementById(`q${state.query}-r${row}`);
    if (li) li.scrollIntoView({ block: "center" }); else scrollTo(0, 0);
  };

  const theme = () => {
    const dark = getComputedStyle(document.documentElement).colorScheme;
    const now = dark === "dark" || (dark !== "light" && matchMedia("(prefers-color-scheme: dark)").matches);
    document.documentElement.dataset.theme = now ? "light" : "dark";
    try { localStorage.setItem("gradfn-theme", document.documentElement.dataset.theme); } catch { /* not kept */ }
  };
  const step = (by) => {
    const rows = [...sections[state.query].querySelectorAll(".side:not(.off) li.row")];
    const now = rows.findIndex((li) => Number(li.dataset.row) === state.row);
    const next = rows[Math.min(Math.max(now + by, 0), rows.length - 1)];
    if (next) go(state.query, Number(next.dataset.row), true);
  };
  const decide = (row, name, on) => {
    if (on) decisions.set(row, name); else decisions.delete(row);
    document.querySelectorAll(`li.row[data-row="${row}"] .decide input`).forEach((box) => { box.checked = decisions.get(row) === box.name; });
    try { localStorage.setItem("gradfn:" + location.pathname, JSON.stringify([...decisions].map(([row, name]) => [row, data.ids[place.get(row)], name]))); } catch { /* not kept */ }
  };
  const save = () => {
    const lines = [...decisions].sort((a, b) => a[0] - b[0]).map(([row, decision]) => {
      const at = place.get(row);
      return JSON.stringify({ row, id: data.ids[at], decision, score: column().scores[at], label: data.labels[at], predicted: data.predicted[row] }) + "\n";
    });
    const link = make("a");
    link.href = URL.createObjectURL(new Blob(lines, { type: "application/jsonl" }));
    link.download = "decisions.jsonl";
    link.click();
    URL.revokeObjectURL(link.href);
  };

  const keys = {
    j: () => step(1), k: () => step(-1), n: () => go(state.query + 1, null), p: () => go(state.query - 1, null),
    "/": () => $("filter").focus(), t: theme,
    x: () => data.own && state.row !== null && decide(state.row, "wrong", decisions.get(state.row) !== "wrong"),
    c: () => data.own && state.row !== null && decide(state.row, "right", decisions.get(state.row) !== "right"),
  };
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.matches("input:not([type=checkbox]), select, textarea")) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    if (keys[event.key]) {
      event.preventDefault();
      keys[event.key]();
    }
  });
  addEventListener("hashchange", read);
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a.id"), side = event.target.closest(".further");
    const li = event.target.closest("li.row");
    if (link) event.preventDefault();
    if (li && !event.target.closest("label")) go(state.query, Number(li.dataset.row), Boolean(link));
    if (side) { state.more += PAGE; render(); }
  });
  document.addEventListener("change", (event) => {
    if (event.target.closest(".decide")) decide(Number(event.target.value), event.target.name, event.target.checked);
  });
  document.addEventListener("pointermove", (event) => {
    const svg = event.target.closest && event.target.closest(".heat");
    if (!svg) return;
    const to = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.querySelector(".cells").getScreenCTM().inverse());
    const x = Math.floor(to.x), y = Math.floor(to.y), wide = data.heat.columns.length;
    const found = data.heat.cells[`${state.query}-${state.row ?? sections[state.query].querySelector("li.row").dataset.row}`];
    if (!found || x < 0 || y < 0 || x >= wide || y >= data.heat.layers.length) return;
    const share = found[0] * (LETTERS.indexOf(found[1][y * wide + x]) - 31) / 31;
    svg.parentElement.querySelector(".cellwords").textContent = `— layer ${data.heat.layers[y]}, ${data.heat.columns[x]}: about ${signed(Number(share.toPrecision(2)))}`;
  });
  const listen = (name, kind, change) => $(name).addEventListener(kind, (event) => { change(event.target); state.more = 0; render(); });
  const damped = () => {
    const names = data.runs[state.run].dampings;
    $("damped").hidden = names.length < 2;
    $("damping").max = names.length - 1;
    $("damping").value = state.damping;
    $("damped").querySelector("output").textContent = names[state.damping];
  };
  listen("run", "change", (to) => { state.run = Number(to.value); state.damping = 0; damped(); });
  listen("damping", "input", (to) => { state.damping = Number(to.value); damped(); });
  listen("order", "change", (to) => { state.order = to.value; });
  listen("filter", "input", (to) => { state.filter = to.value; });
  $("find").addEventListener("input", (event) => links.forEach((link) => {
    link.parentElement.hidden = !link.textContent.toLowerCase().includes(event.target.value.toLowerCase());
  }));
  $("theme").addEventListener("click", theme);
  if ($("export")) $("export").addEventListener("click", save);
  document.querySelector(".controls").addEventListener("submit", (event) => event.preventDefault());
  document.querySelectorAll(".controls, #theme, .find, .keys").forEach((one) => { one.hidden = false; });
  $("run").parentElement.hidden = data.runs.length < 2;
  try {
    const kept = localStorage.getItem("gradfn-theme");
    if (kept === "dark" || kept === "light") document.documentElement.dataset.theme = kept;
    for (const [row, id, name] of JSON.parse(localStorage.getItem("gradfn:" + location.pathname) || "[]")) {
      if (data.own && place.has(row) && data.ids[place.get(row)] === id) decisions.set(row, name);
    }
  } catch { /* nothing is kept */ }
  if (!sections.length) {
    document.querySelectorAll(".controls, .find, .keys").forEach((one) => { one.hidden = true; });
    return;
  }
  damped();
  render();
  read();
})();
