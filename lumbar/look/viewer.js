// The viewer of one study. viewer_page.py fills in the two names in capitals on the line after the next, viewer_data.py
// says what the data are. Lengths are in mm.
(() => {
const root = document.getElementById(ROOT_ID), data = DATA;
const dot = (a, b) => a[0]*b[0] + a[1]*b[1] + a[2]*b[2];
const sub = (a, b) => [a[0]-b[0], a[1]-b[1], a[2]-b[2]];
const cross = (a, b) => [a[1]*b[2]-a[2]*b[1], a[2]*b[0]-a[0]*b[2], a[0]*b[1]-a[1]*b[0]];
const along = (o, u, s, v, t) => [0, 1, 2].map(i => o[i] + u[i]*s + v[i]*t);
const clamp = (x, low, high) => Math.max(low, Math.min(high, x));
const find = query => root.querySelector(query), all = query => [...root.querySelectorAll(query)];
const on = name => { const box = find('input[data-show=' + name + ']'); return box && box.checked; };
function put(parent, tag, attributes, text) {
  const item = document.createElementNS(parent.namespaceURI, tag);
  for (const name in attributes) item.setAttribute(name, attributes[name]);
  if (text) item.textContent = text;
  return parent.appendChild(item);
}
const bytes = text => Uint8Array.from(atob(text), letter => letter.charCodeAt(0));

// What is chosen: a level and a condition (numbers), a point of the patient, zoom, the grey scale.
const state = { level: 3, condition: 0, point: null, zoom: false, centre: .5, width: 1 };
const turn = { yaw: .7, pitch: .25, zoom: 1 };
const panels = all('figure[data-panel]').map(figure => ({
  figure, frames: data.panels[+figure.dataset.panel], svg: figure.querySelector('svg'), now: 0,
  slider: figure.querySelector('input'), caption: figure.querySelector('figcaption span'),
  series: figure.querySelector('select'), canvas: figure.querySelector('canvas'), over: figure.querySelector('svg g') }));
for (const panel of panels) for (const frame of panel.frames) {
  Object.assign(frame, data.stacks[frame.s]);
  frame.picture = new Image();
  frame.picture.src = 'data:image/jpeg;base64,' + frame.i;
  delete frame.i;
  frame.picture.decode().catch(() => {}).then(() => { if (panel.frames[panel.now] === frame) draw(); });
}

// ---- Geometry ----

// The line in which plane a cuts plane b, within both pictures: two points in b's millimetres, or null.
function cut(a, b) {
  const p = dot(a.n, b.u), q = dot(a.n, b.v), r = dot(a.n, sub(a.o, b.o)), size = p*p + q*q;
  if (size < 1e-3) return null;
  const start = along(b.o, b.u, r*p/size, b.v, r*q/size), way = along([0, 0, 0], b.u, -q, b.v, p);
  let low = -1e9, high = 1e9;
  const limit = (from, step, length) => {
    if (Math.abs(step) < 1e-9) { if (from < 0 || from > length) high = -1e9; return; }
    const one = -from/step, two = (length - from)/step;
    low = Math.max(low, Math.min(one, two)); high = Math.min(high, Math.max(one, two));
  };
  for (const plane of [a, b]) {
    limit(dot(sub(start, plane.o), plane.u), dot(way, plane.u), plane.w);
    limit(dot(sub(start, plane.o), plane.v), dot(way, plane.v), plane.h);
  }
  if (low >= high) return null;
  return [low, high].map(t => sub(along(start, way, t, way, 0), b.o)).map(d => [dot(d, b.u), dot(d, b.v)]);
}
const onto = (point, plane) => { const d = sub(point, plane.o); return [dot(d, plane.u), dot(d, plane.v)]; };
const away = (point, plane) => dot(sub(point, plane.o), plane.n);
// The square part of a slice that is shown: its corner and side.
function view(frame) {
  const whole = Math.max(frame.w, frame.h);
  if (!state.zoom || !state.point) return [(frame.w - whole)/2, (frame.h - whole)/2, whole];
  const side = Math.min(90, whole), [x, y] = onto(state.point, frame);
  return [clamp(x, 0, frame.w) - side/2, clamp(y, 0, frame.h) - side/2, side];
}

// ---- Slices ----

// Text kept between two horizontal limits, by a guess of its width.
function label(parent, x, y, size, text, colour, anchor = 'start', low = -1e9, high = 1e9) {
  const wide = .56*size*text.length, left = anchor === 'end' ? x - wide : anchor === 'middle' ? x - wide/2 : x;
  x += clamp(left, low, Math.max(low, high - wide)) - left;
  put(parent, 'text', { x, y, 'font-size': size, fill: colour, 'text-anchor': anchor }, text);
}
function drawPanel(panel) {
  const frame = panel.frames[panel.now], [x0, y0, side] = view(frame), canvas = panel.canvas;
  const pixels = Math.round(clamp(canvas.clientWidth*(window.devicePixelRatio || 1), 64, 1024));
  if (canvas.width !== pixels) canvas.width = canvas.height = pixels;
  const pen = canvas.getContext('2d'), k = pixels/side;
  pen.fillStyle = '#000'; pen.fillRect(0, 0, pixels, pixels);
  pen.imageSmoothingQuality = 'high';
  if (frame.picture.complete && frame.picture.naturalWidth)
    pen.drawImage(frame.picture, -x0*k, -y0*k, frame.w*k, frame.h*k);
  panel.svg.setAttribute('viewBox', [x0, y0, side, side].join(' '));
  panel.slider.value = panel.now; panel.caption.textContent = frame.c;
  panel.slider.setAttribute('aria-valuetext', frame.c);
  if (panel.series) panel.series.value = frame.s;
  const over = panel.over, font = side*.036;
  over.replaceChildren();
  if (on('lines')) {
    for (const other of panels) {
      const line = other !== panel && cut(other.frames[other.now], frame);
      if (line) put(over, 'line', { x1: line[0][0], y1: line[0][1], x2: line[1][0], y2: line[1][1], stroke: '#fff',
        'stroke-dasharray': '5 4', opacity: .75, class: 'reference' });
    }
  }
  const names = [];
  if (on('bones')) for (const [number, points] of frame.m.v) {
    const bone = data.bones[number], x = points.filter((_, i) => i % 2 === 0), y = points.filter((_, i) => i % 2);
    put(over, 'polygon', { points: points.join(' '), stroke: '#fff', opacity: .8, class: 'bone',
      'stroke-dasharray': bone.seen ? 'none' : '2 4' });
    names.push([x.reduce((a, b) => a + b)/x.length, y.reduce((a, b) => a + b)/y.length + font*.35, bone.name]);
  }
  if (on('boxes')) for (const [level, sure, points] of frame.m.b) {
    put(over, 'polygon', { points: points.join(' '), stroke: data.colours[level], class: 'box',
      'stroke-dasharray': sure ? 'none' : '6 4', style: level === state.level ? 'stroke-width:2.5px' : '' });
    const y = points.filter((_, i) => i % 2), x = points.filter((_, i) => i % 2 === 0), left = Math.min(...x) - x0;
    const beside = left > side*.13;
    label(over, x0 + (beside ? left - side*.01 : side*.01),
      clamp(y.reduce((a, b) => a + b)/y.length, y0 + side*.05, y0 + side*.97), font, data.levels[level],
      data.colours[level], beside ? 'end' : 'start');
  }
  // Names last: the boxes' edges run through the bodies.
  for (const [x, y, name] of names) label(over, x, y, font, name, '#fff', 'middle');
  if (on('found')) for (const [, condition, p, x, y, size] of frame.m.d) {
    const best = p.indexOf(Math.max(...p));
    put(over, 'rect', { x: x - size/2, y: y - size/2, width: size, height: size, stroke: data.gradeColours[best],
      class: 'found', 'stroke-dasharray': ['2 3', '7 3', 'none'][best] });
    // Left and right boxes of an axial slice overlap: each has its name on its outer side.
    const outer = condition === 4 ? 'end' : 'start';
    label(over, x + (condition < 3 ? -size/2 : 0), y - size/2 - font*.3, font*.9,
      data.grades[best].split('/')[0] + ' ' + p[best].toFixed(2), data.gradeColours[best], outer, x0, x0 + side);
  }
  if (on('points')) for (const [level, x, y, name] of frame.m.p) {
    put(over, 'circle', { cx: x, cy: y, r: side*.014, stroke: data.colours[level], class: 'point' });
    // Of two points at one height, left and right, each has its name on its own side.
    const end = frame.m.p.some(other => other[1] > x + 1 && Math.abs(other[2] - y) < side*.06);
    label(over, x + (end ? -1 : 1)*side*.022, y + font*.35, font, name, data.colours[level], end ? 'end' : 'start',
      x0 + side*.01, x0 + side*.99);
  }
  if (state.point) {
    const [x, y] = onto(state.point, frame), r = side*.03, gap = side*.008;
    put(over, 'path', { d: [[-r, 0, -gap, 0], [gap, 0, r, 0], [0, -r, 0, -gap], [0, gap, 0, r]].map(([a, b, c, d]) =>
      'M' + (x + a) + ' ' + (y + b) + 'L' + (x + c) + ' ' + (y + d)).join(''), stroke: '#fff', class: 'cross',
      opacity: Math.abs(away(state.point, frame)) < frame.g*.75 ? 1 : .35 });
  }
  [[.03, .515], [.97, .515], [.5, .045], [.5, .985]].forEach(([x, y], i) =>
    label(over, x0 + x*side, y0 + y*side, font, frame.l[i], '#ddd', 'middle'));
}

// ---- The level's crops, along the disc ----

const crops = all('.crops svg');
function drawCrops() {
  const own = data.crops && data.crops.planes[state.level];
  if (!own) return;
  find('.crop-caption').textContent = data.levels[state.level] + ', tilt of the disc: ' + data.crops.tilts[state.level];
  crops.forEach((svg, number) => {
    const plane = own[state.condition][Math.floor(number/3)], picture = plane.i[number % 3];
    svg.setAttribute('viewBox', '0 0 ' + plane.w + ' ' + plane.h);
    const image = svg.querySelector('image'), over = svg.querySelector('g');
    image.setAttribute('width', plane.w); image.setAttribute('height', plane.h);
    if (picture < 0) image.removeAttribute('href');
    else image.setAttribute('href', 'data:image/jpeg;base64,' + data.crops.pictures[picture]);
    over.replaceChildren();
    for (const other of own[state.condition]) {
      const line = other !== plane && cut(other, plane);
      if (line) put(over, 'line', { x1: line[0][0], y1: line[0][1], x2: line[1][0], y2: line[1][1],
        stroke: data.colours[state.level], 'stroke-dasharray': '3 5', opacity: .6 });
    }
    if (picture < 0) label(over, plane.w/2, plane.h/2 - 8, 8, 'no slice here', '#ccc', 'middle');
    label(over, 5, plane.h/2 + 2, 7, plane.l[0], '#ddd', 'middle');
    label(over, plane.w - 5, plane.h/2 + 2, 7, plane.l[1], '#ddd', 'middle');
  });
}

// ---- The study in space ----

const space = find('.space canvas'), cloud = data.cloud && { at: new Int16Array(bytes(data.cloud.xyz).buffer),
  grey: bytes(data.cloud.grey), canvas: document.createElement('canvas') };
// The points as a picture of their own, written pixel by pixel: thousands of rectangles take a canvas ten times as long.
function drawCloud(size, k, right, up) {
  const { at, grey, canvas } = cloud;
  if (canvas.width !== size) canvas.width = canvas.height = size;
  const pen = canvas.getContext('2d'), picture = pen.createImageData(size, size), pixels = picture.data;
  const wide = Math.max(1, Math.round(size/420*Math.sqrt(turn.zoom)));
  let n = 0;
  data.cloud.counts.forEach((count, kind) => {
    const [r, g, b] = data.cloud.colours[kind];
    for (const end = n + count; n < end; n++) {
      const d0 = at[3*n]/10 - data.middle[0], d1 = at[3*n + 1]/10 - data.middle[1], d2 = at[3*n + 2]/10 - data.middle[2];
      const x = Math.round(size/2 + k*(d0*right[0] + d1*right[1] + d2*right[2]));
      const y = Math.round(size/2 - k*(d0*up[0] + d1*up[1] + d2*up[2])), share = .35 + .65*grey[n]/255;
      for (let i = Math.max(0, x); i < Math.min(size, x + wide); i++)
        for (let j = Math.max(0, y); j < Math.min(size, y + wide); j++) {
          const pixel = 4*(j*size + i);
          pixels[pixel] = Math.max(pixels[pixel], r*share); pixels[pixel + 1] = Math.max(pixels[pixel + 1], g*share);
          pixels[pixel + 2] = Math.max(pixels[pixel + 2], b*share); pixels[pixel + 3] = 255;
        }
    }
  });
  pen.putImageData(picture, 0, 0);
  return canvas;
}
const EDGES = [...Array(8).keys()].flatMap(a => [1, 2, 4].filter(bit => !(a & bit)).map(bit => [a, a | bit]));
function drawSpace() {
  if (!space || !data.middle) return;
  const scale = window.devicePixelRatio || 1, size = Math.round(clamp(space.clientWidth*scale, 64, 1024));
  if (space.width !== size) space.width = space.height = size;
  const pen = space.getContext('2d'), k = size/data.reach*turn.zoom;
  const [c, s, C, S] = [Math.cos(turn.yaw), Math.sin(turn.yaw), Math.cos(turn.pitch), Math.sin(turn.pitch)];
  const right = [c, s, 0], towards = [C*s, -C*c, S], up = cross(towards, right);
  const flat = point => { const d = sub(point, data.middle); return [size/2 + k*dot(d, right), size/2 - k*dot(d, up)]; };
  pen.setTransform(1, 0, 0, 1, 0, 0);
  pen.globalCompositeOperation = 'source-over'; pen.globalAlpha = 1;
  pen.fillStyle = '#000'; pen.fillRect(0, 0, size, size);
  pen.globalCompositeOperation = 'lighten';
  if (on('planes')) for (const panel of panels) {
    const frame = panel.frames[panel.now], picture = frame.picture;
    if (!picture.complete || !picture.naturalWidth) continue;
    const [x, y] = flat(frame.o), a = k*frame.w/picture.naturalWidth, b = k*frame.h/picture.naturalHeight;
    // Without perspective a slice in space is its picture, sheared.
    pen.setTransform(a*dot(frame.u, right), -a*dot(frame.u, up), b*dot(frame.v, right), -b*dot(frame.v, up), x, y);
    pen.drawImage(picture, 0, 0);
  }
  pen.setTransform(1, 0, 0, 1, 0, 0);
  if (on('cloud') && data.cloud) pen.drawImage(drawCloud(size, k, right, up), 0, 0);
  pen.globalCompositeOperation = 'source-over';
  pen.textAlign = 'center'; pen.textBaseline = 'middle'; pen.lineJoin = 'round';
  const write = (text, [x, y], colour, points) => {
    pen.font = points*scale + 'px system-ui,sans-serif';
    pen.lineWidth = 3*scale; pen.strokeStyle = '#000'; pen.setLineDash([]); pen.strokeText(text, x, y);
    pen.fillStyle = colour; pen.fillText(text, x, y);
  };
  const wires = (corners, colour, width, dash) => {
    const at = corners.map(flat);
    pen.strokeStyle = colour; pen.lineWidth = width*scale; pen.setLineDash(dash.map(part => part*scale));
    pen.beginPath();
    for (const [a, b] of EDGES) { pen.moveTo(...at[a]); pen.lineTo(...at[b]); }
    pen.stroke();
  };
  const middle = corners => [0, 1, 2].map(i => corners.reduce((sum, corner) => sum + corner[i], 0)/corners.length);
  if (on('bones')) for (const bone of data.bones) {
    wires(bone.corners, 'rgba(255,255,255,.75)', 1, bone.seen ? [] : [2, 4]);
    write(bone.name, flat(middle(bone.corners)), '#fff', 11);
  }
  if (on('boxes')) data.boxes.forEach(box => {
    wires(box.corners, data.colours[box.level], box.level === state.level ? 2.6 : 1.3, box.sure ? [] : [6, 4]);
    // Names stand at the corner that is farthest to the right, out of the spine's way.
    const at = box.corners.map(flat).reduce((a, b) => b[0] > a[0] ? b : a);
    write(data.levels[box.level], [at[0] + 18*scale, at[1]], data.colours[box.level], 12);
  });
  if (state.point) {
    const [x, y] = flat(state.point), r = 6*scale;
    pen.strokeStyle = '#fff'; pen.lineWidth = 2*scale; pen.setLineDash([]);
    pen.beginPath(); pen.moveTo(x - r, y); pen.lineTo(x + r, y); pen.moveTo(x, y - r); pen.lineTo(x, y + r); pen.stroke();
  }
  // A small cross of axes: where left, back and head are.
  [[[1, 0, 0], 'L'], [[0, 1, 0], 'P'], [[0, 0, 1], 'H']].forEach(([axis, letter]) => {
    const o = [34*scale, size - 34*scale], d = [18*scale*dot(axis, right), -18*scale*dot(axis, up)];
    pen.strokeStyle = '#bbb'; pen.lineWidth = 1.5*scale; pen.setLineDash([]);
    pen.beginPath(); pen.moveTo(...o); pen.lineTo(o[0] + d[0], o[1] + d[1]); pen.stroke();
    write(letter, [o[0] + 1.5*d[0], o[1] + 1.5*d[1]], '#eee', 11);
  });
}

// ---- What was predicted and read for the chosen cell ----

function drawAnswer() {
  const answer = find('.answer .grades');
  if (!answer) return;
  const read = data.truth ? data.truth[state.condition][state.level] : -1;
  find('.answer-caption').textContent = data.levels[state.level] + ', ' + data.conditions[state.condition].toLowerCase();
  answer.replaceChildren();
  data.grades.forEach((grade, number) => {
    const row = put(answer, 'tr', { class: read === number ? 'read' : '' });
    put(row, 'th', { scope: 'row' }, grade);
    for (const member of data.members) {
      const p = member[state.condition][state.level], cell = put(row, 'td', {}, p ? Math.round(100*p[number]) + '%' : '–');
      const bar = put(cell, 'div', { class: 'bar' });
      if (p) put(bar, 'i', { style: 'width:' + 100*p[number] + '%;background:' + data.gradeColours[number] });
    }
    put(row, 'td', {}, read === number ? '◀ read' : '');
  });
  const member = find('select[data-pick=member]');
  if (member) all('[data-member]').forEach(table => { table.hidden = table.dataset.member !== member.value; });
  all('td[data-cell]').forEach(cell =>
    cell.classList.toggle('here', cell.dataset.cell === state.level + ',' + state.condition));
}

// ---- Putting it on the screen ----

let asked = 0, drawn = 0;
// However many events come, one picture a frame of the screen.
function draw() { asked = asked || requestAnimationFrame(drawNow); }
function drawNow() {
  const started = performance.now();
  asked = 0;
  panels.forEach(drawPanel); drawSpace(); drawAnswer();
  const slope = 1/state.width, intercept = .5 - state.centre/state.width;
  for (const part of all('filter [data-grey]')) {
    part.setAttribute('slope', slope); part.setAttribute('intercept', intercept);
  }
  root.dataset.drawn = ++drawn; root.dataset.ms = (performance.now() - started).toFixed(1);
}
function show(panel, number) { panel.now = clamp(number, 0, panel.frames.length - 1); draw(); }
// Every series but one goes to the slice nearest to a point of the patient.
function jump(point, except) {
  state.point = point;
  for (const panel of panels) if (panel !== except) {
    let best = 1e9;
    panel.frames.forEach((frame, number) => {
      const [x, y] = onto(point, frame);
      const far = Math.abs(away(point, frame)) + Math.max(0, -x, x - frame.w) + Math.max(0, -y, y - frame.h);
      if (far < best) { best = far; panel.now = number; }
    });
  }
  draw();
}
function choose(level, condition) {
  state.level = (level + 5) % 5; state.condition = (condition + 5) % 5;
  find('select[data-pick=level]').value = state.level;
  find('select[data-pick=condition]').value = state.condition;
  if (data.points[state.level]) jump(data.points[state.level][state.condition]);
  drawCrops(); draw();
}
function grey(centre, width) {
  state.centre = clamp(centre, 0, 1); state.width = clamp(width, .05, 2);
  find('input[data-grey=centre]').value = state.centre; find('input[data-grey=width]').value = state.width;
  draw();
}
for (const panel of panels) {
  panel.now = panel.frames.length >> 1;
  panel.slider.addEventListener('input', () => show(panel, +panel.slider.value));
  if (panel.series) panel.series.addEventListener('change', () =>
    show(panel, panel.frames.findIndex(frame => frame.s === +panel.series.value)));
  panel.svg.addEventListener('wheel', event => {
    event.preventDefault(); show(panel, panel.now + Math.sign(event.deltaY));
  }, { passive: false });
  let last = null;
  const here = event => {
    const frame = panel.frames[panel.now], area = panel.svg.getBoundingClientRect(), [x0, y0, side] = last.view;
    jump(along(frame.o, frame.u, x0 + (event.clientX - area.left)/area.width*side, frame.v,
      y0 + (event.clientY - area.top)/area.height*side), panel);
  };
  panel.svg.addEventListener('pointerdown', event => {
    if (event.button) return;
    panel.svg.focus(); panel.svg.setPointerCapture(event.pointerId);
    last = { x: event.clientX, y: event.clientY, grey: event.shiftKey, view: view(panel.frames[panel.now]) };
    if (!last.grey) here(event);
  });
  panel.svg.addEventListener('pointermove', event => {
    if (!last) return;
    if (!last.grey) return here(event);
    grey(state.centre - (event.clientY - last.y)/400, state.width + (event.clientX - last.x)/200);
    last.x = event.clientX; last.y = event.clientY;
  });
  for (const end of ['pointerup', 'pointercancel']) panel.svg.addEventListener(end, () => { last = null; });
  panel.svg.addEventListener('keydown', event => {
    const step = { ArrowUp: -1, ArrowLeft: -1, ArrowDown: 1, ArrowRight: 1, PageUp: -5, PageDown: 5, Home: -1e4, End: 1e4 };
    if (step[event.key]) { event.preventDefault(); show(panel, panel.now + step[event.key]); }
  });
}
if (space) {
  let last = null;
  const views = { front: [0, 0], left: [Math.PI/2, 0], above: [0, 1.5], oblique: [.7, .25] };
  const look = name => { [turn.yaw, turn.pitch] = views[name]; turn.zoom = 1; draw(); };
  const rotate = (yaw, pitch) => { turn.yaw += yaw; turn.pitch = clamp(turn.pitch + pitch, -1.57, 1.57); draw(); };
  const nearer = factor => { turn.zoom = clamp(turn.zoom*factor, .5, 6); draw(); };
  space.addEventListener('pointerdown', event => {
    space.focus(); space.setPointerCapture(event.pointerId); last = [event.clientX, event.clientY];
  });
  space.addEventListener('pointermove', event => {
    if (!last) return;
    rotate((last[0] - event.clientX)/150, (event.clientY - last[1])/150);
    last = [event.clientX, event.clientY];
  });
  for (const end of ['pointerup', 'pointercancel']) space.addEventListener(end, () => { last = null; });
  space.addEventListener('wheel', event => {
    event.preventDefault(); nearer(Math.exp(-event.deltaY/600));
  }, { passive: false });
  space.addEventListener('keydown', event => {
    const act = { ArrowLeft: () => rotate(.1, 0), ArrowRight: () => rotate(-.1, 0), ArrowUp: () => rotate(0, -.1),
      ArrowDown: () => rotate(0, .1), '+': () => nearer(1.15), '-': () => nearer(1/1.15), Home: () => look('oblique') };
    if (act[event.key]) { event.preventDefault(); event.stopPropagation(); act[event.key](); }
  });
  for (const button of all('button[data-look]')) button.addEventListener('click', () => look(button.dataset.look));
}
for (const box of all('input[data-show]')) box.addEventListener('change', draw);
for (const range of all('input[data-grey]')) range.addEventListener('input', () => {
  grey(+find('input[data-grey=centre]').value, +find('input[data-grey=width]').value);
});
find('button[data-reset]').addEventListener('click', () => { state.zoom = find('input[data-zoom]').checked = false; grey(.5, 1); });
find('input[data-zoom]').addEventListener('change', event => { state.zoom = event.target.checked; draw(); });
for (const pick of all('select[data-pick]')) pick.addEventListener('change', () => {
  choose(+find('select[data-pick=level]').value, +find('select[data-pick=condition]').value);
});
for (const cell of all('td[data-cell]')) {
  const go = () => choose(...cell.dataset.cell.split(',').map(Number));
  cell.addEventListener('click', go);
  cell.addEventListener('keydown', event => { if (event.key === 'Enter') go(); });
}
function toggle(box) { box.checked = !box.checked; box.dispatchEvent(new Event('change')); }
const hidden = [];
root.addEventListener('keydown', event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const act = { c: () => choose(state.level, state.condition + 1), C: () => choose(state.level, state.condition - 1),
    z: () => toggle(find('input[data-zoom]')), '+': () => grey(state.centre, state.width/1.1),
    '-': () => grey(state.centre, state.width*1.1), '0': () => find('button[data-reset]').click(),
    o: () => {
      const shown = all('.tools input[data-show]').filter(box => box.checked);
      (shown.length ? hidden.splice(0, 9, ...shown) && shown : hidden.splice(0)).forEach(toggle);
    } };
  for (const number of [1, 2, 3, 4, 5]) act[number] = () => choose(number - 1, state.condition);
  if (act[event.key] && event.target.tagName !== 'SELECT') { event.preventDefault(); act[event.key](); }
  // Jupyter has its own meaning for these keys; JupyterLab is told by an attribute of the root, too.
  event.stopPropagation();
});
new ResizeObserver(draw).observe(root);
choose(...data.start);
})();
