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
  const SVG = "http://www.w3.org/2000/svg";
  const draw = (tag, attributes) => {
    const made = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    return made;
  };
  const sections = [...document.querySelectorAll("section.query")];
  const links = [...document.querySelectorAll("nav.queries li a")];
  const linkOf = (query) => links[Number(sections[query].dataset.link)];
  const tokens = [...document.querySelectorAll(".whole .token")];
  const place = new Map(data.rows.map((row, at) => [row, at]));
  const words = data.rows.map((_, at) =>
    [data.ids[at], data.texts[at], data.labels[at] || "", ...Object.values(data.columns).map((c) => c[at])].join("\n").toLowerCase());
  const texts = new Map([...document.querySelectorAll("li.row")].map((li) => [li.id, li.querySelector(".text")]));
  const PAGE = data.own ? 50 : Math.max(10, ...sections.map((s) => s.querySelectorAll("li.row").length / 2));
  const state = { query: 0, row: null, run: 0, damping: 0, order: "sides", filter: "", more: 0 };
  const decisions = new Map();

  const signed = (value) => {
    const text = Number(value.toPrecision(4)).toString().replace("-", "−");
    return value >= 0 ? "+" + text : text;
  };
  // Another run is shown at the damping of the same name, or else at its first.
  const dampingOf = (run) => {
    const name = data.runs[state.run].dampings[state.damping];
    return run === state.run ? state.damping : Math.max(0, data.runs[run].dampings.indexOf(name));
  };
  const column = (run = state.run) => {
    const damping = dampingOf(run);
    const scores = data.runs[run].scores[damping][state.query];
    const [low, high, levels] = data.runs[run].histograms[damping][state.query];
    return { scores, low, high, levels, most: Math.max(-low, high) || 1 };
  };
  const title = (run) => {
    const { name, dampings } = data.runs[run];
    return dampings.length > 1 ? `${name} (damping ${dampings[dampingOf(run)]})` : name;
  };
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

  // --- a row

  const shade = (value, most) => Math.abs(value) < 0.08 * most || !value ? ""
    : (value > 0 ? "p" : "n") + Math.ceil(4 * Math.abs(value) / most);
  const marked = (row, at, id) => {
    const damping = data.marks && dampingOf(data.marks.run);
    const pieces = data.marks && data.marks.rows[`${damping}-${state.query}-${row}`];
    if (!pieces && texts.has(id) && (!data.marks || damping === data.marks.own)) return texts.get(id).cloneNode(true);
    const text = make("p", "text", pieces ? undefined : data.texts[at]);
    text.dir = "auto";
    for (const [piece, kind] of pieces || []) text.append(kind ? make("mark", kind, piece) : piece);
    return text;
  };
  const cells = (at) => Object.entries(data.columns).filter(([, values]) => values[at]).flatMap(([name, values]) => {
    const cell = make("span", "cell");
    cell.append(make("span", "name", name), " ", make("bdi", "", values[at]));
    return [cell, " "];
  });
  const ranked = (rank) => data.depth && rank > data.depth ? "beyond rank " + data.depth : "rank " + rank;
  const beside = (other, at, bar) => {
    const shown = make("span", "other"), name = make("span", "name");
    setBar(bar, other.scores[at] / other.most);
    name.append(make("bdi", "", other.name), ", " + ranked(other.ranks[at]));
    shown.append(bar, make("span", "score", signed(other.scores[at])), name);
    return shown;
  };
  const nearest = ([label, ids]) => {
    const line = make("p", "near"), name = make("span", "name", "nearest by " + data.nearBy);
    if (label) name.append(", labelled ", make("bdi", "", label));
    line.append(name, " ", make("bdi", "", ids));
    return line;
  };
  const classes = (li, row, at) => {
    const labels = li.querySelector(".labels"), label = data.labels[at], said = data.predicted[row];
    if (!labels) return;
    if (label) labels.append("label ", make("b", "", label));
    if (said) labels.append(", the model says ", make("b", said === label ? "" : "con", said));
  };
  const card = (at, rank, one, others) => {
    const li = $("card").content.firstElementChild.cloneNode(true);
    const row = data.rows[at], score = one.scores[at], id = `q${state.query}-r${row}`;
    const get = (name) => li.querySelector(name);
    li.id = id;
    li.dataset.row = row;
    get(".rank").textContent = data.depth && rank > data.depth ? ">" + data.depth : rank;
    setBar(get(".bar"), score / one.most);
    get(".score").textContent = signed(score);
    get(".score").className = "score " + (score >= 0 ? "pro" : "con");
    get(".id").href = "#" + id;
    get(".id bdi").textContent = data.ids[at];
    if (data.sources[state.query] === row) get(".badges").append(make("span", "badge known", "known source"));
    const lexical = data.bm25.length ? data.bm25[state.query].indexOf(row) : -1;
    if (lexical >= 0) get(".badges").append(make("span", "badge", "BM25 " + (lexical + 1)));
    get(".place use").setAttribute("href", "#h" + state.query);
    get(".place .here").setAttribute("d", here(one, score));
    get(".text").replaceWith(marked(row, at, id));
    get(".more").append(...cells(at));
    get(".others").append(...others.map((other) => beside(other, at, get(".bar").cloneNode(true))));
    classes(li, row, at);
    if (data.own) {
      get(".ticks").hidden = false;
      get(".ticks").setAttribute("aria-label", "Your decision on " + data.ids[at]);
    }
    for (const box of li.querySelectorAll("input")) {
      box.value = row;
      box.checked = decisions.get(row) === box.name;
    }
    li.append(...(data.near[row] || []).map(nearest));
    if (data.images && $("i" + row)) {
      const image = draw("svg", { class: "thumb", viewBox: "0 0 1 1", role: "img", "aria-label": "the image of row " + data.ids[at] });
      image.append(draw("use", { href: "#i" + row }));
      li.insertBefore(image, get(".text"));
    }
    return li;
  };

  // --- a query

  const here = (one, score) => `M${100 * (score - one.low) / (one.high - one.low)} 0V24`;
  const chosen = () => {
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
    const rank = ranks(title === "Opponents" ? one.scores.map((score) => -score) : one.scores);
    list.replaceChildren(...shown.map((at) => card(at, rank[at], one, others)));
    side.querySelector("h3").textContent = title;
    side.querySelector(".further").hidden = shown.length === rows.length;
    return shown.length;
  };
  const lists = (section, one) => {
    const others = data.runs.map((run, n) => n === state.run ? null : { name: title(n), ...column(n) }).filter(Boolean);
    others.forEach((other) => { other.ranks = ranks(other.scores); });
    const rows = chosen(), sides = [...section.querySelectorAll(".side")], both = state.order === "sides";
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
  };
  const agreeing = (section) => {
    const lines = [...section.querySelectorAll(".agrees")], mine = `${state.run}.${state.damping}`;
    const others = data.runs.map((_, n) => n).filter((n) => n !== state.run);
    others.forEach((other, n) => {
      const theirs = `${other}.${dampingOf(other)}`;
      const [same, order] = data.agreement[state.run < other ? `${mine}-${theirs}` : `${theirs}-${mine}`][state.query];
      lines[n].textContent = `${title(other)}: ${same} of the top ${data.top} are the same, rank correlation ${order.toFixed(2)}`;
    });
  };
  const histogram = (section, one) => {
    section.querySelector(".bins").setAttribute("d", binsPath(one.levels));
    section.querySelector(".histogram").setAttribute("aria-label", `histogram of all scores, from ${signed(one.low)} to ${signed(one.high)}`);
    const ends = section.querySelectorAll(".all .ends span");
    ends[0].textContent = signed(one.low);
    ends[2].textContent = signed(one.high);
    section.querySelector(".all .axis").setAttribute("d", here(one, 0));
    section.querySelector(".rug").replaceChildren(...[...section.querySelectorAll("li.row")].map((li) => {
      const score = one.scores[place.get(Number(li.dataset.row))];
      return draw("path", { class: score >= 0 ? "pro" : "con", d: here(one, score).replace(" 0V", " 20V") });
    }));
  };
  const render = () => {
    const section = sections[state.query], one = column(), own = document.querySelector(`.whole [data-query="${state.query}"]`);
    sections.forEach((other) => other.classList.toggle("off", other !== section));
    document.querySelectorAll(".whole").forEach((whole) => whole.classList.toggle("off", !whole.contains(own)));
    links.forEach((link) => link === linkOf(state.query) ? link.setAttribute("aria-current", "true") : link.removeAttribute("aria-current"));
    section.querySelectorAll(".shown").forEach((shown) => { shown.textContent = title(state.run); });
    lists(section, one);
    agreeing(section);
    histogram(section, one);
    mark();
  };

  // --- the row that is looked at

  const LETTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz-";
  const shares = (row) => {
    const found = data.heat && data.heat.cells[`${dampingOf(data.heat.run)}-${state.query}-${row}`];
    return found && [...found[1]].map((letter) => found[0] * (LETTERS.indexOf(letter) - 31) / 31);
  };
  const cellName = (n) => {
    const wide = data.heat.columns.length, layer = data.heat.layers[Math.floor(n / wide)];
    return (layer ? `layer ${layer}, ` : "") + data.heat.columns[n % wide];
  };
  const about = (value) => "about " + signed(Number(value.toPrecision(2)));
  const heat = (section, row) => {
    const svg = section.querySelector(".heat"), found = shares(row), cells = section.querySelector(".heat .cells");
    if (!svg) return;
    const wide = data.heat.columns.length, most = Math.max(...(found || []).map(Math.abs)) || 1;
    cells.replaceChildren(cells.firstElementChild, ...(found || []).flatMap((share, n) => share === 0 ? [] : [draw("path", {
      class: share > 0 ? "pro" : "con", "fill-opacity": Math.abs(share) / most, d: `M${n % wide} ${Math.floor(n / wide)}h1v1h-1z`,
    })]));
    const strong = [...(found || []).keys()].sort((a, b) => Math.abs(found[b]) - Math.abs(found[a])).slice(0, 3);
    section.querySelector(".blocks .of").textContent = data.ids[place.get(row)];
    section.querySelectorAll(".blocks .in").forEach((name) => { name.textContent = title(data.heat.run); });
    section.querySelector(".cellwords").textContent = "";
    section.querySelector(".strongest").textContent = found
      ? strong.map((n) => `${cellName(n)} ${about(found[n])}`).join("; ")
      : "not kept for this row, which no list of the first run begins with";
  };
  const whole = (row) => {
    const own = tokens.filter((token) => !token.closest(".off")), at = place.get(row);
    const scores = own.map((token) => data.runs[state.run].scores[state.damping][Number(token.dataset.query)][at]);
    const most = Math.max(...scores.map(Math.abs)) || 1;
    own.forEach((token, n) => {
      token.className = "token " + shade(scores[n], most);
      token.title = signed(scores[n]);
      if (Number(token.dataset.query) === state.query) token.setAttribute("aria-current", "true");
      else token.removeAttribute("aria-current");
    });
    document.querySelectorAll(".whole .of").forEach((of) => { of.textContent = data.ids[at]; });
  };
  // The chosen row, or else the first that is listed.
  const looked = () => {
    const first = sections[state.query].querySelector("li.row");
    return place.has(state.row) ? state.row : first && Number(first.dataset.row);
  };
  const mark = () => {
    const section = sections[state.query], one = column(), at = place.get(state.row);
    section.querySelectorAll("li.row").forEach((li) => li.classList.toggle("now", Number(li.dataset.row) === state.row));
    section.querySelectorAll(".lines polyline").forEach((line) => line.classList.toggle("now", Number(line.dataset.row) === state.row));
    section.querySelector(".histogram > .here").setAttribute("d", at === undefined ? "" : here(one, one.scores[at]));
    if (looked() === null) return;
    heat(section, looked());
    whole(looked());
  };
  const address = () => {
    const parts = [["r", state.row], ["m", state.run || null], ["d", state.damping || null]];
    const tail = parts.filter(([, value]) => value !== null).map(([letter, value]) => `-${letter}${value}`);
    history.replaceState(null, "", `#q${state.query}${tail.join("")}`);
  };
  const go = (query, row, focus) => {
    if (query < 0 || query >= sections.length) return;
    const other = query !== state.query;
    Object.assign(state, { query, row, more: other ? 0 : state.more });
    if (other) render(); else mark();
    address();
    const li = row !== null && $(`q${query}-r${row}`);
    if (li && focus) li.querySelector(".id").focus({ preventScroll: true });
    if (li && focus) li.scrollIntoView({ block: "nearest" });
    else if (other) linkOf(query).scrollIntoView({ block: "nearest" });
  };
  const read = () => {
    const found = /^#q(\d+)(?:-r(\d+))?(?:-m(\d+))?(?:-d(\d+))?$/.exec(location.hash);
    if (!found || Number(found[1]) >= sections.length) return;
    const [query, row, run, damping] = found.slice(1).map((part) => part === undefined ? null : Number(part));
    Object.assign(state, { query, row: place.has(row) ? row : null, more: 0 });
    if (run !== null && run < data.runs.length) Object.assign(state, { run, damping: 0 });
    if (damping !== null && damping < data.runs[state.run].dampings.length) state.damping = damping;
    settle();
    render();
    if (state.row !== null && !$(`q${query}-r${row}`)) {
      Object.assign(state, { filter: data.ids[place.get(row)], order: "high" });
      $("filter").value = state.filter;
      $("order").value = "high";
      render();
    }
    address();
    const li = state.row !== null && $(`q${query}-r${row}`);
    if (li) li.scrollIntoView({ block: "center" }); else scrollTo(0, 0);
  };

  // --- what is remembered

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
      return JSON.stringify({ row, id: data.ids[at], decision, run: title(state.run), score: column().scores[at], label: data.labels[at], predicted: data.predicted[row] }) + "\n";
    });
    const link = make("a");
    link.href = URL.createObjectURL(new Blob(lines, { type: "application/jsonl" }));
    link.download = "decisions.jsonl";
    link.click();
    URL.revokeObjectURL(link.href);
  };

  // --- keys, clicks and controls

  const keys = {
    j: () => step(1), k: () => step(-1), n: () => go(state.query + 1, null), p: () => go(state.query - 1, null),
    "/": () => $("filter").focus(), t: theme,
    x: () => data.own && state.row !== null && decide(state.row, "wrong", decisions.get(state.row) !== "wrong"),
    c: () => data.own && state.row !== null && decide(state.row, "right", decisions.get(state.row) !== "right"),
  };
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !$("keyed").checked) return;
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
    if (event.ctrlKey || event.metaKey || event.shiftKey) return;
    const token = event.target.closest(".token");
    if (link || token) event.preventDefault();
    if (token) go(Number(token.dataset.query), state.row);
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
    const found = shares(looked());
    if (!found || x < 0 || y < 0 || x >= wide || y >= data.heat.layers.length) return;
    svg.parentElement.querySelector(".cellwords").textContent = `. Here: ${cellName(y * wide + x)} ${about(found[y * wide + x])}`;
  });
  const settle = () => {
    const names = data.runs[state.run].dampings;
    $("damped").hidden = names.length < 2;
    if ($("still")) $("still").hidden = names.length < 2;
    $("damping").max = names.length - 1;
    $("damping").value = state.damping;
    $("damping").setAttribute("aria-valuetext", names[state.damping]);
    $("damped").querySelector("output").textContent = names[state.damping];
    $("run").value = state.run;
    for (const option of $("order").options) option.disabled = option.value === `differ${state.run}`;
    if (state.order === `differ${state.run}`) $("order").value = state.order = "sides";
  };
  const listen = (name, kind, change) => $(name).addEventListener(kind, (event) => {
    change(event.target);
    state.more = 0;
    settle();
    render();
    address();
  });
  listen("run", "change", (to) => {
    const name = data.runs[state.run].dampings[state.damping];
    state.run = Number(to.value);
    state.damping = Math.max(0, data.runs[state.run].dampings.indexOf(name));
  });
  listen("damping", "input", (to) => { state.damping = Number(to.value); });
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
  settle();
  render();
  read();
})();
