(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("data").textContent);
  const panel = document.getElementById("panel");
  const sections = [...document.querySelectorAll("main section")];
  const buttons = [...document.querySelectorAll(".sources button")];
  const pieces = sections.map((section) => [...section.querySelectorAll("[data-byte]")]);
  const offsets = pieces.map((list) => list.map((piece) => Number(piece.dataset.byte)));
  let at = 0, held = null, shown = null, lit = [];

  // First of sorted numbers that is greater than a value; their count where none is.
  const after = (count, number, value) => {
    let low = 0, high = count;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (number(middle) > value) high = middle; else low = middle + 1;
    }
    return low;
  };
  const covering = (rows, byte) => Math.min(after(rows.length, (i) => rows[i][1], byte), rows.length - 1);
  const ofByte = (byte) => {
    const view = data.sources[at];
    return { source: covering(view.source, byte), target: covering(view.target, byte) };
  };
  const ofTarget = (target) => {
    const view = data.sources[at];
    return { source: covering(view.source, view.target[target][0]), target };
  };
  const ofSource = (source) => {
    const view = data.sources[at];
    return { source, target: covering(view.target, view.source[source][0]) };
  };

  const element = (tag, kind, text) => {
    const made = document.createElement(tag);
    if (kind) made.className = kind;
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const share = (p) => {
    if (p >= 0.0995) return (100 * p).toFixed(1) + "%";
    return p >= 1e-4 || p <= 0 ? (100 * p).toFixed(2) + "%" : "<0.01%";
  };
  const nats = (value) => (value === null ? "not known" : Math.abs(value).toFixed(3) + " nats");
  const line = (name, p, kind) => {
    const row = element("div", "r " + kind);
    row.style.setProperty("--w", Math.min(100 * p, 100).toFixed(1) + "%");
    row.append(element("bdi", "", name), element("span", "", share(p)));
    return row;
  };
  const column = (title, row, names, kind) => {
    const made = element("div", "column " + kind);
    made.append(element("h2", "", title));
    if (!row) return made;
    const [start, end, id, label, tail, entries, leftOut, leftMass] = row;
    const head = element("p", "token");
    head.append(element("bdi", "", names[id]));
    made.append(head);
    const bytes = start === end ? "no bytes, at " + start : "bytes " + start + " to " + end;
    made.append(element("p", "n", "label " + nats(label) + " · " + bytes));
    for (const [token, logprob] of entries)
      made.append(line(names[token], Math.exp(logprob), token === id ? "label" : ""));
    if (label !== null && !entries.some(([token]) => token === id))
      made.append(line(names[id], Math.exp(label), "label"));
    if (leftOut) made.append(line(leftOut + " more entries", leftMass, "rest"));
    made.append(line("tail", tail, "rest tail"));
    return made;
  };
  const fill = (place) => {
    const view = data.sources[at];
    const target = view.target[place.target];
    if (!target) {
      panel.replaceChildren(element("p", "soft", "The segment has no tokens."));
      return;
    }
    const columns = element("div", "columns");
    const counted = (i, rows) => i + " of " + rows.length;
    columns.append(
      column(view.name + ", token " + counted(place.source, view.source), view.source[place.source], view.names[0], "source"),
      column("target, position " + counted(place.target, view.target), target, view.names[1], "target"),
    );
    const origin = element("p", "origin", "origin: " + data.origins[view.origin[place.target]]);
    const parts = [columns, origin];
    const begins = covering(view.source, target[0]);
    if (begins !== place.source)
      parts.push(element("p", "n", "This target token begins in source token " + begins + "."));
    const number = view.span[place.target];
    const [start, end, own, aligned, text] = view.spans[number];
    const span = element("p", "span", "span " + number + ", bytes " + start + " to " + end + " ");
    span.append(element("bdi", "", text));
    let cost = ": source " + nats(own) + ", aligned " + nats(aligned);
    if (own !== null && aligned !== null) {
      const excess = Number((aligned - own).toFixed(3));
      cost += ", excess " + (excess > 0 ? "+" : "") + (excess || 0).toFixed(3) + " nats";
    }
    span.append(cost);
    panel.replaceChildren(...parts, span);
  };
  const light = (rows, index, side, kind) => {
    const row = rows[index];
    if (!row) return;
    if (row[0] === row[1]) {
      lit.push([sections[at].querySelector("[data-" + side + '="' + index + '"]'), "on"]);
      return;
    }
    const starts = offsets[at];
    let i = after(starts.length, (k) => starts[k], row[0]) - 1;
    for (; i < starts.length && starts[i] < row[1]; i++) lit.push([pieces[at][i], kind]);
  };
  const show = (place) => {
    for (const [piece, kind] of lit) piece.classList.remove(kind);
    lit = [];
    shown = place;
    fill(place);
    light(data.sources[at].source, place.source, "source", "on-s");
    light(data.sources[at].target, place.target, "target", "on-t");
    lit = lit.filter(([piece]) => piece);
    for (const [piece, kind] of lit) piece.classList.add(kind);
  };
  const hold = (place) => {
    held = place;
    show(place);
  };
  // Bring the target token into the part of the window that the panel leaves free, if it is not there.
  const reveal = () => {
    const piece = (lit.find(([, kind]) => kind === "on-t") || lit[0] || [])[0];
    if (!piece) return;
    const beside = matchMedia("(min-width: 1000px)").matches;
    const bottom = beside ? innerHeight : panel.getBoundingClientRect().top;
    const box = piece.getBoundingClientRect();
    if (box.top < 0 || box.bottom > bottom) piece.scrollIntoView({ block: "center" });
  };
  const choose = (index) => {
    at = index;
    sections.forEach((section, i) => { section.hidden = i !== index; });
    buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(i === index)));
    const last = data.sources[at].target.length - 1;
    hold(last < 0 ? { source: 0, target: 0 } : ofTarget(Math.min(held ? held.target : data.position, last)));
  };
  const placeOf = (node) => {
    const piece = node.closest("[data-byte],[data-source],[data-target]");
    if (!piece) return null;
    if (piece.dataset.byte !== undefined) return ofByte(Number(piece.dataset.byte));
    return piece.dataset.source === undefined ? ofTarget(Number(piece.dataset.target)) : ofSource(Number(piece.dataset.source));
  };
  const step = (key, bySource) => {
    const view = data.sources[at];
    const rows = bySource ? view.source : view.target;
    const from = bySource ? shown.source : shown.target;
    const to = { ArrowLeft: from - 1, ArrowRight: from + 1, Home: 0, End: rows.length - 1 }[key];
    if (to < 0 || to >= rows.length) return;
    hold(bySource ? ofSource(to) : ofTarget(to));
    reveal();
  };

  buttons.forEach((button, i) => button.addEventListener("click", () => choose(i)));
  for (const section of sections) {
    section.addEventListener("mouseover", (event) => {
      const place = placeOf(event.target);
      if (place) show(place);
    });
    section.addEventListener("mouseleave", () => show(held));
    section.addEventListener("click", (event) => {
      const place = placeOf(event.target);
      if (place) hold(place);
    });
  }
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    if (!["ArrowLeft", "ArrowRight", "Home", "End"].includes(event.key)) return;
    event.preventDefault();
    step(event.key, event.shiftKey);
  });
  choose(0);
  if (data.position) reveal();
})();
