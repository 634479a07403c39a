// A presenter without background: stacked pictures (colour above, matte below) recombined, or a colour keyed out.

const VERTEX = `
attribute vec2 corner;
varying vec2 at;
void main() {
  at = vec2(corner.x * 0.5 + 0.5, 0.5 - corner.y * 0.5);
  gl_Position = vec4(corner, 0.0, 1.0);
}`;

// Half a texel from the seam: neither half may bleed into the other.
const STACKED = `
precision mediump float;
uniform sampler2D picture;
uniform vec2 texel;
varying vec2 at;
void main() {
  float y = at.y * 0.5;
  vec3 colour = texture2D(picture, vec2(at.x, min(y, 0.5 - texel.y))).rgb;
  float matte = texture2D(picture, vec2(at.x, max(y + 0.5, 0.5 + texel.y))).g;
  // What the encoder leaves of pure black and pure white.
  matte = clamp((matte - 0.02) / 0.96, 0.0, 1.0);
  gl_FragColor = vec4(colour * matte, matte);
}`;

// Distance of chroma from the key's; what remains of the key's hue at the edge is taken out.
const KEYED = `
precision mediump float;
uniform sampler2D picture;
uniform vec3 key;
uniform vec2 range;
varying vec2 at;
vec2 chroma(vec3 c) {
  return vec2(-0.169 * c.r - 0.331 * c.g + 0.5 * c.b, 0.5 * c.r - 0.419 * c.g - 0.081 * c.b);
}
void main() {
  vec3 c = texture2D(picture, at).rgb;
  vec2 k = chroma(key);
  float matte = smoothstep(range.x, range.y, distance(chroma(c), k));
  vec2 hue = normalize(k + 1e-5);
  float spill = max(dot(chroma(c), hue), 0.0) * step(0.05, length(k));
  vec2 clean = chroma(c) - spill * (1.0 - matte * 0.3) * hue;
  float luma = dot(c, vec3(0.299, 0.587, 0.114));
  vec3 colour = spill > 0.0 && matte < 1.0
    ? vec3(luma + 1.402 * clean.y, luma - 0.344 * clean.x - 0.714 * clean.y, luma + 1.772 * clean.x) : c;
  gl_FragColor = vec4(clamp(colour, 0.0, 1.0) * matte, matte);
}`;

function compiled(gl, kind, text) {
  const shader = gl.createShader(kind);
  gl.shaderSource(shader, text);
  gl.compileShader(shader);
  if (!gl.getShaderParameter(shader, gl.COMPILE_STATUS) && !gl.isContextLost()) throw new Error(gl.getShaderInfoLog(shader));
  return shader;
}

/** `#rrggbb` → three numbers in 0…1. */
export function colourOf(text) {
  const digits = /^#?([0-9a-f]{2})([0-9a-f]{2})([0-9a-f]{2})$/i.exec(text);
  return digits ? digits.slice(1).map((d) => parseInt(d, 16) / 255) : null;
}

/** Draws `video` on `canvas` with transparency. `key`: keyed out instead of a stacked picture's matte. */
export class Cutout {
  constructor(canvas, video, key = null, { near = 0.12, far = 0.28 } = {}) {
    Object.assign(this, { canvas, video, key, near, far, drawn: 0 });
    canvas.addEventListener('webglcontextlost', (e) => { e.preventDefault(); this.gl = null; });
    canvas.addEventListener('webglcontextrestored', () => this.begin());
    this.begin();
    this.next();
  }

  begin() {
    // Read back by screenshots and by recorders of the page: keep what was drawn.
    const gl = this.canvas.getContext('webgl', { alpha: true, premultipliedAlpha: true, antialias: false, preserveDrawingBuffer: true });
    if (!gl) throw new Error('this browser has no WebGL');
    const program = gl.createProgram();
    gl.attachShader(program, compiled(gl, gl.VERTEX_SHADER, VERTEX));
    gl.attachShader(program, compiled(gl, gl.FRAGMENT_SHADER, this.key ? KEYED : STACKED));
    gl.linkProgram(program);
    gl.useProgram(program);
    gl.bindBuffer(gl.ARRAY_BUFFER, gl.createBuffer());
    gl.bufferData(gl.ARRAY_BUFFER, new Float32Array([-1, -1, 1, -1, -1, 1, 1, 1]), gl.STATIC_DRAW);
    const corner = gl.getAttribLocation(program, 'corner');
    gl.enableVertexAttribArray(corner);
    gl.vertexAttribPointer(corner, 2, gl.FLOAT, false, 0, 0);
    gl.bindTexture(gl.TEXTURE_2D, gl.createTexture());
    for (const [name, value] of [[gl.TEXTURE_WRAP_S, gl.CLAMP_TO_EDGE], [gl.TEXTURE_WRAP_T, gl.CLAMP_TO_EDGE],
      [gl.TEXTURE_MIN_FILTER, gl.LINEAR], [gl.TEXTURE_MAG_FILTER, gl.LINEAR]]) gl.texParameteri(gl.TEXTURE_2D, name, value);
    gl.disable(gl.BLEND);
    this.texel = gl.getUniformLocation(program, 'texel');
    if (this.key) {
      gl.uniform3fv(gl.getUniformLocation(program, 'key'), this.key);
      gl.uniform2f(gl.getUniformLocation(program, 'range'), this.near, this.far);
    }
    this.gl = gl;
  }

  next() {
    const draw = () => {
      this.draw();
      this.next();
    };
    if (this.video.requestVideoFrameCallback) this.video.requestVideoFrameCallback(draw);
    else requestAnimationFrame(draw);
  }

  draw() {
    const { gl, video, canvas } = this;
    const [width, height] = [video.videoWidth, video.videoHeight];
    if (!gl || !width) return;
    const shown = this.key ? height : height / 2;
    // Pixels of the screen, not of the video: enlarging is then the shader's, with a soft matte.
    const box = canvas.getBoundingClientRect();
    const scale = Math.max(1, Math.min(4, (box.width * devicePixelRatio) / width));
    const [w, h] = [Math.round(width * scale), Math.round(shown * scale)];
    if (canvas.width !== w || canvas.height !== h) [canvas.width, canvas.height] = [w, h];
    gl.viewport(0, 0, w, h);
    gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA, gl.RGBA, gl.UNSIGNED_BYTE, video);
    if (!this.key) gl.uniform2f(this.texel, 0.5 / width, 0.75 / height);
    gl.drawArrays(gl.TRIANGLE_STRIP, 0, 4);
    this.drawn += 1;
    canvas.dispatchEvent(new CustomEvent('shown', { detail: width / shown }));
  }

  /** Nobody is there: nothing is shown. */
  clear() {
    const { gl } = this;
    if (!gl) return;
    gl.clearColor(0, 0, 0, 0);
    gl.clear(gl.COLOR_BUFFER_BIT);
  }
}
