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

// ---- Labels: none lies on another ----

const ruler = document.createElement('canvas').getContext('2d');
function widthOf(text, size) {
  ruler.font = '100px system-ui,sans-serif';
  return ruler.measureText(text).width*size/100 + .25*size;
}
// Finds room for texts between x0, y0 and x1, y1. Each call takes wishes [x, y, anchor, strict], y the text's middle, and
// moves them up and down by at most `far`, and sideways to keep within the limits unless they are strict. It answers
// { x, y, size, moved } with the text's left end, or null without room.
function placer(x0, y0, x1, y1) {
  const taken = [];
  const place = (text, size, wishes, far = 0) => {
    const wide = widthOf(text, size), tall = 1.2*size, step = .3*size;
    for (let k = 0; k*step <= far + 1e-9; k++) for (const way of k ? [-1, 1] : [1]) for (const [x, y, anchor, strict] of wishes) {
      const wished = x - (anchor === 'end' ? wide : anchor === 'middle' ? wide/2 : 0), left = clamp(wished, x0, x1 - wide);
      if (strict && Math.abs(left - wished) > .3*size) continue;
      const middle = clamp(y + way*k*step, y0 + tall/2, y1 - tall/2), top = middle - tall/2;
      if (left < x0 || top < y0 - 1e-9) continue;
      if (taken.some(([a, b, c, d]) => left < c && a < left + wide && top < d && b < top + tall)) continue;
      taken.push([left, top, left + wide, top + tall]);
      return { x: left + .12*size, y: middle, size, moved: Math.abs(middle - y) > .7*size, end: left + wide/2 < x };
    }
    return null;
  };
  place.keep = (...area) => taken.push(area);
  return place;
}
// Heights as near to the given ones as they can be at least `gap` apart, in the same order.
function spread(heights, gap) {
  const order = heights.map((_, i) => i).sort((a, b) => heights[a] - heights[b]), blocks = [], result = [];
  order.forEach((i, place) => {
    blocks.push({ sum: heights[i] - place*gap, count: 1 });
    const mean = block => block.sum/block.count;
    while (blocks.length > 1 && mean(blocks.at(-2)) >= mean(blocks.at(-1))) {
      const last = blocks.pop(), before = blocks.at(-1);
      before.sum += last.sum; before.count += last.count;
    }
  });
  let place = 0;
  for (const block of blocks) for (let n = 0; n < block.count; n++) {
    result[order[place]] = block.sum/block.count + place*gap;
    place++;
  }
  return result;
}
const levelText = level => data.levels[level] + (data.second[level] ? ' or ' + data.second[level][0] : '');
function write(parent, spot, text, colour) {
  put(parent, 'text', { x: spot.x, y: spot.y + .36*spot.size, 'font-size': spot.size, fill: colour }, text);
}
// A text that had to move away is tied to its place by a thin line.
function tie(parent, spot, text, [x, y], colour) {
  if (!spot.moved) return;
  const end = spot.end ? spot.x + widthOf(text, spot.size) - .25*spot.size : spot.x;
  put(parent, 'line', { x1: end, y1: spot.y, x2: x, y2: y, stroke: colour, class: 'tie' });
}

// ---- Slices ----

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
  // In the picture's millimetres, but never so small that it cannot be read.
  const over = panel.over, font = side*Math.max(.036, 11.5/Math.max(1, canvas.clientWidth));
  over.replaceChildren();
  if (on('lines')) {
    for (const other of panels) {
      const line = other !== panel && cut(other.frames[other.now], frame);
      if (line) put(over, 'line', { x1: line[0][0], y1: line[0][1], x2: line[1][0], y2: line[1][1], stroke: '#fff',
        'stroke-dasharray': '5 4', opacity: .75, class: 'reference' });
    }
  }
  const names = [], levels = [], points = [], found = [];
  if (on('bones')) for (const [number, points] of frame.m.v) {
    const bone = data.bones[number], x = points.filter((_, i) => i % 2 === 0), y = points.filter((_, i) => i % 2);
    put(over, 'polygon', { points: points.join(' '), stroke: '#fff', opacity: .8, class: 'bone',
      'stroke-dasharray': bone.seen ? 'none' : '2 4' });
    names.push([x.reduce((a, b) => a + b)/x.length, y.reduce((a, b) => a + b)/y.length, bone.name]);
  }
  if (on('boxes')) for (const [level, sure, points] of frame.m.b) {
    put(over, 'polygon', { points: points.join(' '), stroke: data.colours[level], class: 'box',
      'stroke-dasharray': sure ? 'none' : '6 4', style: level === state.level ? 'stroke-width:2.5px' : '' });
    const y = points.filter((_, i) => i % 2), x = points.filter((_, i) => i % 2 === 0);
    levels.push({ level, left: Math.min(...x), right: Math.max(...x), y: y.reduce((a, b) => a + b)/y.length });
  }
  if (on('found')) for (const [, condition, p, x, y, size] of frame.m.d) {
    const best = p.indexOf(Math.max(...p));
    put(over, 'rect', { x: x - size/2, y: y - size/2, width: size, height: size, stroke: data.gradeColours[best],
      class: 'found', 'stroke-dasharray': ['2 3', '7 3', 'none'][best] });
    found.push({ condition, best, text: data.grades[best].split('/')[0] + ' ' + p[best].toFixed(2), x, y, half: size/2 });
  }
  if (on('points')) for (const [level, x, y, name] of frame.m.p) {
    put(over, 'circle', { cx: x, cy: y, r: side*.014, stroke: data.colours[level], class: 'point' });
    points.push([level, x, y, name]);
  }
  if (state.point) {
    const [x, y] = onto(state.point, frame), r = side*.03, gap = side*.008;
    put(over, 'path', { d: [[-r, 0, -gap, 0], [gap, 0, r, 0], [0, -r, 0, -gap], [0, gap, 0, r]].map(([a, b, c, d]) =>
      'M' + (x + a) + ' ' + (y + b) + 'L' + (x + c) + ' ' + (y + d)).join(''), stroke: '#fff', class: 'cross',
      opacity: Math.abs(away(state.point, frame)) < frame.g*.75 ? 1 : .35 });
  }
  // Texts last: outlines run through them. Vertebrae give way to levels, and go without a name where there is no room.
  const edge = side*.01, place = placer(x0 + edge, y0 + edge, x0 + side - edge, y0 + side - edge);
  const seen = (x, y) => x > x0 && x < x0 + side && y > y0 && y < y0 + side;
  for (const [, x, y] of points) place.keep(x - side*.014, y - side*.014, x + side*.014, y + side*.014);
  const heights = spread(levels.map(one => one.y), 1.25*font);
  levels.forEach((one, i) => {
    const text = levelText(one.level), colour = data.colours[one.level];
    if (one.right < x0 || one.left > x0 + side || one.y < y0 - side*.1 || one.y > y0 + side*1.1) return;
    const spot = place(text, font, [[one.left - side*.01, heights[i], 'end']], side*.3)
      || place(text, font, [[one.right + side*.01, heights[i], 'start']], side*.3);
    if (!spot) return;
    spot.moved = Math.abs(spot.y - one.y) > .7*font;
    tie(over, spot, text, [spot.end ? one.left : one.right, one.y], colour);
    write(over, spot, text, colour);
  });
  for (const [level, x, y, name] of points) if (seen(x, y)) {
    const colour = data.colours[level], off = side*.022;
    // On an axial slice, and of two points at one height, each has its name on its own side.
    const wishes = [[x + off, y, 'start', true], [x - off, y, 'end', true]];
    const outer = 'LR'.includes(frame.l[0]) && x < x0 + side/2;
    if (outer || points.some(other => other[1] > x + 1 && Math.abs(other[2] - y) < side*.06)) wishes.reverse();
    wishes.push([x, y - off - .6*font, 'middle'], [x, y + off + .6*font, 'middle']);
    const spot = place(name, font, wishes, side*.25);
    if (!spot) continue;
    tie(over, spot, name, [x, y], colour);
    write(over, spot, name, colour);
  }
  for (const { condition, best, text, x, y, half } of found) if (seen(x, y)) {
    // Left and right boxes of an axial slice overlap: each has its name on its outer side.
    const colour = data.gradeInks[best], size = .9*font, anchor = condition === 4 ? 'end' : 'start';
    const start = condition < 3 ? x - half : x, high = y - half - .7*size, low = y + half + .7*size;
    const spot = place(text, size, [[start, high, anchor], [start, low, anchor], [x + half + .3*size, y, 'start'],
      [x - half - .3*size, y, 'end']], side*.25);
    if (!spot) continue;
    spot.moved = spot.moved && (spot.y < high - size || spot.y > low + size);
    tie(over, spot, text, [x, y], colour);
    write(over, spot, text, colour);
  }
  for (const [x, y, name] of names) {
    const spot = seen(x, y) && place(name, font, [[x, y, 'middle']]);
    if (spot) write(over, spot, name, '#fff');
  }
  const spots = [.5, .3, .7, .15, .85];
  [t => [.03, t], t => [.97, t], t => [t, .03], t => [t, .97]].forEach((at, i) => {
    const spot = place(frame.l[i], font, spots.map(at).map(([x, y]) => [x0 + x*side, y0 + y*side, 'middle']));
    if (spot) write(over, spot, frame.l[i], '#ddd');
  });
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
    const size = plane.w*Math.max(.07, 11/Math.max(1, svg.clientWidth)), place = placer(0, 0, plane.w, plane.h);
    const texts = [[plane.l[0], .05, .5, '#ddd'], [plane.l[1], .95, .5, '#ddd']];
    if (picture < 0) texts.push(['no slice here', .5, .35, '#ccc']);
    for (const [text, x, y, colour] of texts) {
      const spot = place(text, size, [[x*plane.w, y*plane.h, 'middle']], plane.h/2);
      if (spot) write(over, spot, text, colour);
    }
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
  pen.textAlign = 'left'; pen.textBaseline = 'middle'; pen.lineJoin = 'round';
  const texts = [];
  const inscribe = (text, spot, colour) => {
    pen.font = spot.size + 'px system-ui,sans-serif';
    pen.lineWidth = 3*scale; pen.strokeStyle = '#000'; pen.setLineDash([]); pen.strokeText(text, spot.x, spot.y);
    pen.fillStyle = colour; pen.fillText(text, spot.x, spot.y);
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
    texts.push({ text: bone.name, at: flat(middle(bone.corners)), colour: '#fff', points: 11, far: 0, anchor: 'middle' });
  }
  if (on('boxes')) data.boxes.forEach(box => {
    wires(box.corners, data.colours[box.level], box.level === state.level ? 2.6 : 1.3, box.sure ? [] : [6, 4]);
    // Names stand at the corner that is farthest to the right, out of the spine's way.
    const at = box.corners.map(flat).reduce((a, b) => b[0] > a[0] ? b : a);
    texts.unshift({ text: levelText(box.level), at: [at[0] + 3*scale, at[1]], colour: data.colours[box.level], points: 12,
      far: size*.3, anchor: 'start' });
  });
  if (state.point) {
    const [x, y] = flat(state.point), r = 6*scale;
    pen.strokeStyle = '#fff'; pen.lineWidth = 2*scale; pen.setLineDash([]);
    pen.beginPath(); pen.moveTo(x - r, y); pen.lineTo(x + r, y); pen.moveTo(x, y - r); pen.lineTo(x, y + r); pen.stroke();
  }
  // Levels first: vertebrae that lie behind one another, as seen from above, go without their names.
  const corner = 64*scale, place = placer(0, 0, size, size);
  place.keep(0, size - corner, corner, size);
  for (const { text, at, colour, points, far, anchor } of texts) {
    if (at[0] < 0 || at[0] > size || at[1] < 0 || at[1] > size) continue;
    const spot = place(text, points*scale, [[...at, anchor]], far);
    if (spot) inscribe(text, spot, colour);
  }
  // A small cross of axes: where left, back and head are.
  [[[1, 0, 0], 'L'], [[0, 1, 0], 'P'], [[0, 0, 1], 'H']].forEach(([axis, letter]) => {
    const o = [34*scale, size - 34*scale], d = [18*scale*dot(axis, right), -18*scale*dot(axis, up)];
    pen.strokeStyle = '#bbb'; pen.lineWidth = 1.5*scale; pen.setLineDash([]);
    pen.beginPath(); pen.moveTo(...o); pen.lineTo(o[0] + d[0], o[1] + d[1]); pen.stroke();
    // An axis that points at the viewer has no length, and its letter would lie on another's.
    if (Math.hypot(...d) < 5*scale) return;
    const points = 11*scale, at = [o[0] + 1.5*d[0] - widthOf(letter, points)/2, o[1] + 1.5*d[1]];
    inscribe(letter, { x: at[0], y: at[1], size: points }, '#eee');
  });
}

// ---- What was predicted and read for the chosen cell ----

function drawAnswer() {
  const answer = find('.answer .grades');
  if (!answer) return;
  const read = data.truth ? data.truth[state.condition][state.level] : -1;
  const second = data.second[state.level], or = second ? ' (or ' + second[0] + ', ' + Math.round(100*second[1]) + '%)' : '';
  find('.answer-caption').textContent =
    data.levels[state.level] + or + ', ' + data.conditions[state.condition].toLowerCase();
  answer.replaceChildren();
  data.grades.forEach((grade, number) => {
    const row = put(answer, 'tr', { class: read === number ? 'read' : '' });
    put(row, 'th', { scope: 'row' }, grade);
    for (const member of data.members) {
      const p = member[state.condition][state.level], cell = put(put(row, 'td', {}), 'div', { class: 'part' });
      put(cell, 'span', {}, p ? Math.round(100*p[number]) + '%' : '–');
      const bar = put(cell, 'div', { class: 'bar', 'aria-hidden': true });
      if (p) put(bar, 'i', { style: 'width:' + 100*p[number] + '%;background:' + data.gradeColours[number] });
    }
    if (data.truth) put(row, 'td', {}, read === number ? '◀ read' : '');
  });
  const member = find('select[data-pick=member]');
  if (member) all('[data-member]').forEach(table => { table.hidden = table.dataset.member !== member.value; });
  all('td[data-cell]').forEach(cell =>
    cell.classList.toggle('here', cell.dataset.cell === state.level + ',' + state.condition));
}

// ---- Whose slices the arrow keys turn ----

// The series under the mouse, else the one that has the focus, else the one on which the condition is graded.
let under = null;
function active() {
  return under || panels.find(panel => panel.figure.contains(document.activeElement))
    || panels.find(panel => +panel.figure.dataset.panel === data.graded[state.condition]) || panels[0];
}

// ---- Putting it on the screen ----

let asked = 0, drawn = 0;
// However many events come, one picture a frame of the screen.
function draw() { asked = asked || requestAnimationFrame(drawNow); }
function drawNow() {
  const started = performance.now();
  asked = 0;
  panels.forEach(drawPanel); drawSpace(); drawAnswer();
  for (const panel of panels) panel.figure.classList.toggle('active', panel === active());
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
  panel.figure.addEventListener('pointerenter', () => { under = panel; draw(); });
  panel.figure.addEventListener('pointerleave', () => { under = null; draw(); });
  for (const change of ['focusin', 'focusout']) panel.figure.addEventListener(change, draw);
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
const steps = { ArrowUp: -1, ArrowLeft: -1, ArrowDown: 1, ArrowRight: 1, PageUp: -5, PageDown: 5, Home: -1e4, End: 1e4 };
function press(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const act = { c: () => choose(state.level, state.condition + 1), C: () => choose(state.level, state.condition - 1),
    z: () => toggle(find('input[data-zoom]')), '+': () => grey(state.centre, state.width/1.1),
    '-': () => grey(state.centre, state.width*1.1), '0': () => find('button[data-reset]').click(),
    o: () => {
      const shown = all('.tools input[data-show]').filter(box => box.checked);
      (shown.length ? hidden.splice(0, 9, ...shown) && shown : hidden.splice(0)).forEach(toggle);
    } };
  for (const number of [1, 2, 3, 4, 5]) act[number] = () => choose(number - 1, state.condition);
  const panel = active(), step = steps[event.key], own = event.target;
  if (own.tagName === 'SELECT') return;
  // Sliders and what scrolls have a meaning of their own for the arrows.
  if (step && panel && own.type !== 'range' && !own.classList.contains('scroll')) {
    act[event.key] = () => show(panel, panel.now + step);
  }
  if (act[event.key]) { event.preventDefault(); act[event.key](); }
}
root.addEventListener('keydown', event => {
  press(event);
  // Jupyter has its own meaning for these keys; JupyterLab is told by an attribute of the root, too.
  event.stopPropagation();
});
// Without a click first: keys that nothing has the focus for are this viewer's on a page of its own, elsewhere while the
// mouse is over it.
document.addEventListener('keydown', event => {
  const free = event.target === document.body || event.target === document.documentElement;
  if (free && (root.hasAttribute('data-page') || root.matches(':hover'))) press(event);
});
new ResizeObserver(() => { drawCrops(); draw(); }).observe(root);
choose(...data.start);
})();
