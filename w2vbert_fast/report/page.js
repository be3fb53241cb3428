"use strict";
// Data of the page: scripts with compressed JSON, `rows` and `words` a block of rows each, `page` one.
(async () => {
  const MOST_SHOWN = 400000; // rows: more would make the table higher than browsers can
  const OVERSCAN = 12; // rows that are drawn above and below what is seen
  const UNSURE = 0.5; // words below this confidence are marked

  const $ = (selector) => document.querySelector(selector);

  function make(tag, text, properties = {}) {
    const element = Object.assign(document.createElement(tag), properties);
    if (text !== undefined && text !== null) element.textContent = text;
    return element;
  }

  async function unpack(element) {
    const bytes = Uint8Array.from(atob(element.textContent), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  }

  const page = await unpack($("script.page"));
  const wordBlocks = [...document.querySelectorAll("script.words")];
  const rows = []; // each: cells, failed, audio, offset, seconds
  let blockRows = 0;
  for (const element of document.querySelectorAll("script.rows")) {
    const block = await unpack(element);
    blockRows ||= block.length;
    for (const row of block) rows.push(row);
    element.textContent = "";
  }

  // ---- numbers -------------------------------------------------------------------------------

  function clock(seconds) {
    if (seconds < 60) return `${seconds.toFixed(seconds < 10 ? 2 : 1)} s`;
    const whole = Math.round(seconds), hours = Math.floor(whole / 3600);
    const two = (number) => String(number).padStart(2, "0");
    const minutes = Math.floor(whole / 60) % 60;
    return `${hours ? `${hours}:${two(minutes)}` : minutes}:${two(whole % 60)}`;
  }

  function shown(value, kind) {
    if (value === null || value === undefined) return "";
    if (kind === "seconds") return clock(value);
    if (kind === "share") return `${(100 * value).toFixed(1)} %`;
    if (kind === "number") return value.toLocaleString("en", { maximumSignificantDigits: 5 });
    return String(value);
  }

  // ---- head, curves, findings -----------------------------------------------------------------

  for (const fact of page.facts) {
    const entry = make("div");
    entry.append(make("dt", fact.name), make("dd", fact.value));
    $("#facts").append(entry);
  }

  function svg(tag, attributes, text) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    if (text !== undefined) element.textContent = text;
    return element;
  }

  const WIDTH = 360, HEIGHT = 150, LEFT = 44, BOTTOM = 26, TOP = 8;

  function niceStep(range) {
    const power = 10 ** Math.floor(Math.log10(range));
    return [0.2, 0.5, 1, 2].map((part) => part * power).find((step) => range / step <= 5);
  }

  function ticks(low, high, least = 0) {
    const step = Math.max(least, niceStep(high - low || 1));
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9) + 0; i * step <= high + step * 1e-9; i++) found.push(i * step + 0);
    return found;
  }

  function frame(chart, [x0, x1], [y0, y1], describe, least) {
    const figure = make("figure");
    figure.append(make("h2", chart.title));
    const drawing = svg("svg", {
      viewBox: `0 0 ${WIDTH} ${HEIGHT + (chart.x ? 14 : 0)}`, role: "img", "aria-label": describe,
    });
    const x = (value) => LEFT + ((value - x0) / (x1 - x0 || 1)) * (WIDTH - LEFT - 10);
    const y = (value) => HEIGHT - BOTTOM - ((value - y0) / (y1 - y0 || 1)) * (HEIGHT - BOTTOM - TOP);
    const plain = (value) => value.toLocaleString("en", { maximumSignificantDigits: 4 });
    for (const value of ticks(y0, y1, least)) {
      drawing.append(svg("line", { class: "axis", x1: LEFT, x2: WIDTH - 10, y1: y(value), y2: y(value) }));
      drawing.append(svg("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, plain(value)));
    }
    for (const value of ticks(x0, x1)) {
      drawing.append(svg("text", { x: x(value), y: HEIGHT - BOTTOM + 16, "text-anchor": "middle" }, plain(value)));
    }
    if (chart.x) {
      drawing.append(svg("text", { x: WIDTH - 10, y: HEIGHT + 8, "text-anchor": "end" }, chart.x));
    }
    figure.append(drawing);
    $("#charts").append(figure);
    return { drawing, x, y, figure };
  }

  const bounds = (values) => values.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);

  function drawLines(chart) {
    const lines = Object.entries(chart.lines).filter(([, points]) => points.length > 0);
    if (lines.length === 0) return;
    const all = lines.flatMap(([, points]) => points);
    const xs = bounds(all.map((point) => point[0]));
    const ys = [0, bounds(all.map((point) => point[1]))[1]];
    const last = lines.map(([name, points]) => `${name} ${shown(points.at(-1)[1], "number")}`).join(", ");
    const { drawing, x, y, figure } = frame(chart, xs, ys, `${chart.title}; at the end: ${last}`);
    lines.forEach(([name, points], number) => {
      const at = points.map((point) => `${x(point[0]).toFixed(1)},${y(point[1]).toFixed(1)}`);
      if (at.length === 1) at.push(`${WIDTH - 10},${at[0].split(",")[1]}`);
      const curve = svg("polyline", { class: number ? "curve other" : "curve", points: at.join(" ") });
      curve.append(svg("title", {}, name));
      drawing.append(curve);
    });
    const legend = lines.length > 1 ? ` (${lines.map(([name], n) => (n ? "dashed: " : "") + name).join("; ")})` : "";
    figure.append(make("small", chart.y + legend));
  }

  function drawHistogram(chart) {
    const { kind } = page.columns[chart.column];
    const values = rows.map((row) => row[0][chart.column]).filter((value) => typeof value === "number");
    if (values.length === 0) return;
    const scale = kind === "share" ? 100 : 1;
    let [low, high] = bounds(values).map((value) => value * scale);
    if (kind === "share") { low = 0; high = Math.max(100, high); } else low = Math.min(0, low);
    const step = niceStep(high - low || 1) / 4;
    const count = Math.max(1, Math.ceil((high - low) / step - 1e-9));
    const bars = new Array(count).fill(0);
    for (const value of values) bars[Math.min(count - 1, Math.floor((value * scale - low) / step))]++;
    const top = bounds(bars)[1];
    const { drawing, x, y } = frame(
      chart, [low, low + count * step], [0, top],
      `${chart.title}: ${values.length} rows, most between ${shown(low + bars.indexOf(top) * step, "number")} ` +
      `and ${shown(low + (bars.indexOf(top) + 1) * step, "number")}`,
      1,
    );
    bars.forEach((height, i) => {
      if (height === 0) return;
      const from = low + i * step;
      const bar = svg("rect", {
        class: "bar", x: x(from) + 0.5, width: Math.max(1, x(from + step) - x(from) - 1),
        y: Math.min(y(height), y(0) - 1.5), height: Math.max(1.5, y(0) - y(height)),
      });
      bar.append(svg("title", {}, `${shown(from, "number")} to ${shown(from + step, "number")}: ${height}`));
      drawing.append(bar);
    });
  }

  for (const chart of page.charts) chart.column === null ? drawLines(chart) : drawHistogram(chart);

  for (const finding of page.findings) {
    if (finding.entries.length === 0) continue;
    const box = make("div", null, { className: "finding" });
    const list = make("ul");
    for (const [name, number, example] of finding.entries) {
      const line = make("li");
      const label = finding.search ? make("button", name, { type: "button" }) : make("span", name);
      if (finding.search) label.addEventListener("click", () => lookFor(name));
      const count = `${number.toLocaleString("en")} ${finding.unit}`;
      const what = make("div");
      what.append(label);
      if (example) what.append(" ", make("small", example));
      line.append(make("span", count, { className: "number" }), what);
      list.append(line);
    }
    box.append(make("h2", finding.title), list);
    $("#findings").append(box);
  }

  // ---- the table ------------------------------------------------------------------------------

  const columns = page.columns.map((column, number) => ({ ...column, number }));
  const heads = columns.filter((column) => !column.small);
  const view = $("#view"), body = $("#view tbody");
  let order = []; // numbers of the rows that are shown, in order
  let sort = { column: page.sort, descending: page.descending };
  let current = -1; // number of the chosen row
  let texts = null; // what is searched, made at the first search

  // In the table names go without the folder that all of them lie in.
  const folder = (name) => name.slice(0, name.lastIndexOf("/") + 1);
  let common = rows.length > 1 ? folder(rows[0][0][0]) : "";
  for (const [[name], wrong] of rows) {
    while (!wrong && !name.startsWith(common)) common = folder(common.slice(0, -1));
  }
  const short = (name) => (name.startsWith(common) ? name.slice(common.length) : name);

  for (const column of heads) {
    const isText = column.kind === "text";
    const cell = make("th", null, { scope: "col", className: isText ? "wide" : "narrow number" });
    const button = make("button", column.title, { type: "button" });
    button.addEventListener("click", () => {
      const again = sort.column === column.number;
      sort = { column: column.number, descending: again ? !sort.descending : false };
      arrange();
    });
    cell.append(button);
    column.head = cell;
    $("#view thead tr").append(cell);
  }

  // Columns of text stay legible in a narrow window, where the table scrolls sideways.
  const needed = heads.reduce((sum, { kind }) => sum + (kind === "text" ? 10 : 6.5), 0);
  $("table").style.minWidth = `${needed}rem`;

  const plainText = (text) => text.normalize("NFC").toLowerCase();

  function arrange() {
    const wanted = plainText($("#search").value).split(/\s+/).filter(Boolean);
    const kind = $("#show").value;
    if (wanted.length > 0 && texts === null) {
      texts = rows.map((row) => plainText(row[0].filter((value) => typeof value === "string").join("\n")));
    }
    order = [];
    rows.forEach((row, i) => {
      if (kind !== "all" && (kind === "failed") !== Boolean(row[1])) return;
      if (wanted.every((word) => texts[i].includes(word))) order.push(i);
    });
    if (sort.column !== null) {
      const of = (i) => rows[i][0][sort.column] ?? null;
      const collator = new Intl.Collator(undefined, { numeric: true });
      const isText = columns[sort.column].kind === "text";
      const sign = sort.descending ? -1 : 1;
      const values = new Map(order.map((i) => [i, of(i)]));
      order.sort((i, j) => {
        const a = values.get(i), b = values.get(j);
        if (a === null || b === null) return (a === null) - (b === null) || i - j; // those without last
        return sign * (isText ? collator.compare(a, b) : a - b) || i - j;
      });
    }
    for (const { head, number } of heads) {
      if (number === sort.column) head.setAttribute("aria-sort", sort.descending ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    }
    const found = order.length;
    order.length = Math.min(found, MOST_SHOWN);
    const all = rows.length.toLocaleString("en");
    $("#count").value = found > MOST_SHOWN
      ? `the first ${MOST_SHOWN.toLocaleString("en")} of ${found.toLocaleString("en")} rows; search for fewer`
      : found === rows.length ? `${all} rows` : `${found.toLocaleString("en")} of ${all} rows`;
    $("table").setAttribute("aria-rowcount", String(found + 1));
    view.scrollTop = 0;
    draw();
  }

  const rowHeight = () => parseFloat(getComputedStyle(document.documentElement).fontSize) * 2.1;

  function draw() {
    const height = rowHeight();
    const first = Math.max(0, Math.floor(view.scrollTop / height) - OVERSCAN);
    const seen = Math.max(view.clientHeight, innerHeight); // it grows up to its limit with its rows
    const last = Math.min(order.length, Math.ceil((view.scrollTop + seen) / height) + OVERSCAN);
    const drawn = [];
    const space = (count) => {
      const spacer = make("tr", null, { ariaHidden: "true" });
      spacer.style.height = `${count * height}px`;
      return spacer;
    };
    if (first > 0) drawn.push(space(first));
    for (let place = first; place < last; place++) {
      const i = order[place];
      const [cells, failed] = rows[i];
      const line = make("tr", null, { className: failed ? "row failed" : "row" });
      line.dataset.row = i;
      line.setAttribute("aria-rowindex", String(place + 2));
      line.setAttribute("aria-selected", String(i === current));
      for (const { kind, number } of heads) {
        const text = shown(cells[number], kind);
        if (number === 0) line.append(make("td", short(text)));
        else line.append(make("td", text, kind === "text" ? { dir: "auto" } : { className: "number" }));
      }
      drawn.push(line);
    }
    if (last < order.length) drawn.push(space(order.length - last));
    body.replaceChildren(...drawn);
  }

  let waiting = false;
  view.addEventListener("scroll", () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; draw(); });
  });
  addEventListener("resize", draw);
  let typing;
  $("#search").addEventListener("input", () => { clearTimeout(typing); typing = setTimeout(arrange, 120); });
  $("#show").addEventListener("change", arrange);

  function lookFor(text) {
    $("#search").value = text;
    $("#show").value = "all";
    arrange();
    $("#table").scrollIntoView({ block: "start" });
    view.focus({ preventScroll: true });
  }

  // ---- the chosen row, heard and read ----------------------------------------------------------

  const audio = $("audio");
  let words = []; // each: button, start, end
  let end = Infinity;
  let lit = null;
  let opened = null; // the current row's `open`

  async function choose(i, play = false) {
    const place = order.indexOf(i);
    if (i !== current) {
      current = i;
      opened = open(i);
    }
    await opened;
    if (current !== i) return; // another one was chosen meanwhile
    const height = rowHeight(), top = place * height, head = $("thead").offsetHeight;
    if (top < view.scrollTop) view.scrollTop = top;
    else if (top + height + head > view.scrollTop + view.clientHeight) {
      view.scrollTop = top + height + head - view.clientHeight;
    }
    draw();
    // The panel of the chosen row lies above the foot of the window, and not above that row.
    const line = body.querySelector("tr[aria-selected=true]")?.getBoundingClientRect();
    if (line) {
      const hidden = line.bottom - $("#chosen").getBoundingClientRect().top;
      scrollBy(0, hidden > 0 ? hidden : Math.min(0, line.top - head));
    }
    if (play && audio.getAttribute("src")) toggle();
  }

  async function open(i) {
    const [cells, , url, offset, seconds] = rows[i];
    const packed = (await unpack(wordBlocks[Math.floor(i / blockRows)]))[i % blockRows];
    if (current !== i) return;
    audio.pause();
    $("#trouble").hidden = true;
    $("#name").textContent = cells[0];
    end = seconds === null ? Infinity : offset + seconds;
    if (url === null) {
      audio.removeAttribute("src");
      $("#trouble").textContent = "There is no file beside this page that could be played.";
      $("#trouble").hidden = false;
    } else audio.src = `${url}#t=${offset}`;
    audio.hidden = url === null;
    words = [];
    lit = null;
    const said = $("#words");
    said.replaceChildren();
    for (let at = 0, last = 0; at < packed.length; at += 4) {
      const [text, before, length, share] = packed.slice(at, at + 4);
      const start = (last + before) / 1000, stop = start + length / 1000;
      last += before + length;
      const unsure = share !== null && share < 100 * UNSURE;
      const word = make("button", text, { type: "button", className: unsure ? "unsure" : "" });
      const sure = share === null ? "" : `, ${share} % sure`;
      word.title = `${start.toFixed(2)} to ${stop.toFixed(2)} s${sure}`;
      word.addEventListener("click", () => { audio.currentTime = start; if (url) audio.play().catch(failed); });
      said.append(word, " ");
      words.push([word, start, stop]);
    }
    said.hidden = words.length === 0;
    const list = $("#cells");
    list.replaceChildren();
    for (const { title, kind, number } of columns.slice(1)) {
      const value = cells[number];
      if (value !== null && value !== undefined && value !== "") {
        list.append(make("dt", title), make("dd", shown(value, kind), { dir: kind === "text" ? "auto" : "" }));
      }
    }
    $("#chosen").hidden = false;
  }

  function failed(error) {
    if (error && error.name === "AbortError") return; // another row was chosen
    const name = decodeURIComponentOrNot(audio.getAttribute("src") ?? "");
    $("#trouble").textContent = `This browser cannot play ${name}: it is not there any more, or of a kind that it does not know.`;
    $("#trouble").hidden = false;
  }

  function decodeURIComponentOrNot(url) {
    const name = url.split("#")[0];
    try { return decodeURIComponent(name); } catch { return name; }
  }

  function toggle() {
    if (audio.paused) audio.play().catch(failed);
    else audio.pause();
  }

  function follow() {
    if (audio.currentTime >= end + 0.05 && !audio.paused) audio.pause();
    const now = audio.currentTime;
    const found = words.find(([, start, stop]) => start <= now && now < stop)?.[0] ?? null;
    if (found !== lit) {
      lit?.classList.remove("now");
      found?.classList.add("now");
      lit = found;
    }
    if (!audio.paused) requestAnimationFrame(follow);
  }

  audio.addEventListener("play", () => {
    if (audio.currentTime >= end) audio.currentTime = rows[current][3];
    requestAnimationFrame(follow);
  });
  audio.addEventListener("seeked", follow);
  audio.addEventListener("error", () => { if (audio.getAttribute("src")) failed(); });
  $("#close").addEventListener("click", close);

  function close() {
    audio.pause();
    current = -1;
    $("#chosen").hidden = true;
    draw();
    view.focus({ preventScroll: true });
  }

  body.addEventListener("click", (event) => {
    const line = event.target.closest("tr.row");
    if (line) choose(Number(line.dataset.row));
  });
  body.addEventListener("dblclick", (event) => {
    const line = event.target.closest("tr.row");
    if (line) choose(Number(line.dataset.row), true);
  });

  view.addEventListener("keydown", (event) => {
    if (event.target !== view || event.ctrlKey || event.metaKey || event.altKey) return;
    const place = order.indexOf(current);
    const pageRows = Math.max(1, Math.floor(view.clientHeight / rowHeight()) - 2);
    const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: pageRows, PageUp: -pageRows, Home: -Infinity, End: Infinity };
    if (event.key in moves && order.length > 0) {
      event.preventDefault();
      const wanted = place < 0 && event.key.startsWith("Arrow") ? 0 : place + moves[event.key];
      choose(order[Math.min(order.length - 1, Math.max(0, wanted))]);
    } else if ((event.key === "Enter" || event.key === " ") && current >= 0) {
      event.preventDefault();
      choose(current, true);
    }
  });
  addEventListener("keydown", (event) => {
    const isField = event.target.closest?.("input, select");
    if (event.key === "/" && !isField) { event.preventDefault(); $("#search").focus(); }
    if (event.key === "Escape" && current >= 0) close();
  });

  $("#wait").hidden = true;
  $("#table").hidden = rows.length === 0;
  arrange();
})().catch((error) => {
  document.querySelector("#wait").textContent =
    `This browser cannot show the rows (${error.message}): it must know DecompressionStream, as browsers of 2023 do.`;
});
