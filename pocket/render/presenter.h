// The presenter: one picture as a function of position and 72 numbers.  Plain C99, also compiled as CUDA.
//
// World coordinates: x to the right, y down, the picture is -1..1; heads are about 0.7 wide.
// P[0..55] identity (presenters.py names them), P[56..65] controls, P[66..71] visemes.
// Everything that moves is soft in texture: strands and folds are wide, so that a small network can carry them;
// eyes, lips and teeth are crisp.
//
// A caller defines FN (function qualifier) before including this file.
#define PRESENTER_PARAMETERS 72

typedef struct { float r, g, b; } Rgb;

FN float clampf(float x, float a, float b) { return x < a ? a : (x > b ? b : x); }
FN float ramp(float a, float b, float x) { x = clampf((x - a) / (b - a), 0.f, 1.f); return x * x * (3.f - 2.f * x); }
FN float lerp1(float a, float b, float t) { return a + (b - a) * t; }
FN Rgb rgb(float r, float g, float b) { Rgb c; c.r = r; c.g = g; c.b = b; return c; }
FN Rgb scale3(Rgb a, float s) { return rgb(a.r * s, a.g * s, a.b * s); }
FN Rgb lerp3(Rgb a, Rgb b, float t) { return rgb(lerp1(a.r, b.r, t), lerp1(a.g, b.g, t), lerp1(a.b, b.b, t)); }
// shadow (k < 1) keeps warmth: red falls slower than blue
FN Rgb shadow(Rgb c, float k) { return rgb(c.r * lerp1(1.f, k, .82f), c.g * lerp1(1.f, k, 1.03f), c.b * lerp1(1.f, k, 1.06f)); }
FN Rgb light(Rgb c, float t) { return lerp3(c, rgb(1.f, .95f, .88f), t); }

FN float ellipse(float x, float y, float rx, float ry) {
  float a = x / rx, b = y / ry, k0 = sqrtf(a * a + b * b);
  float c = x / (rx * rx), d = y / (ry * ry), k1 = sqrtf(c * c + d * d) + 1e-6f;
  return k0 * (k0 - 1.f) / k1 - (k0 < 1e-4f ? fminf(rx, ry) : 0.f);
}
FN float box(float x, float y, float w, float h, float r) {
  float a = fabsf(x) - w + r, b = fabsf(y) - h + r, ma = fmaxf(a, 0.f), mb = fmaxf(b, 0.f);
  return sqrtf(ma * ma + mb * mb) + fminf(fmaxf(a, b), 0.f) - r;
}
FN float capsule(float x, float y, float ax, float ay, float bx, float by, float r) {
  float px = x - ax, py = y - ay, dx = bx - ax, dy = by - ay;
  float h = clampf((px * dx + py * dy) / (dx * dx + dy * dy + 1e-9f), 0.f, 1.f);
  px -= dx * h; py -= dy * h;
  return sqrtf(px * px + py * py) - r;
}
FN float joined(float a, float b, float k) { float h = clampf(.5f + .5f * (b - a) / k, 0.f, 1.f); return lerp1(b, a, h) - k * h * (1.f - h); }
FN float cover(float d, float px) { return clampf(.5f - d / px, 0.f, 1.f); }
FN float hash1(float n) { float s = sinf(n * 12.9898f + 4.1f) * 43758.5453f; return s - floorf(s); }
FN float strands(float u, float v) { return .5f + .28f * sinf(u + 1.3f * sinf(v)) + .22f * sinf(2.3f * u + 1.7f + sinf(1.9f * v)); }

typedef struct {
  Rgb skin, hair, iris, cloth, lip, back1, back2, wrap, shirt;
  float head_w, head_h, chin, eye, eye_gap, eye_y, brow_h, mouth_w, mouth_y, nose, hair_v, beard, ears, lip_h, seed, blush, side, age, lashes, square;
  int hair_style, glasses, back_style, clothes, head_cover, jewel;
  float yaw, pitch, roll, dx, dy, blink, gaze_x, gaze_y, brow, smile, jaw, width, press, fv, tongue, upper;
} Face;

FN Face face_of(const float* P) {
  Face f;
  f.skin = rgb(P[0], P[1], P[2]); f.hair = rgb(P[3], P[4], P[5]); f.iris = rgb(P[6], P[7], P[8]); f.cloth = rgb(P[9], P[10], P[11]);
  f.lip = rgb(P[12], P[13], P[14]); f.back1 = rgb(P[15], P[16], P[17]); f.back2 = rgb(P[18], P[19], P[20]);
  f.head_w = P[21]; f.head_h = P[22]; f.chin = P[23]; f.eye = P[24]; f.eye_gap = P[25]; f.eye_y = P[26]; f.brow_h = P[27]; f.mouth_w = P[28];
  f.mouth_y = P[29]; f.nose = P[30]; f.hair_style = (int)(P[31] + .5f); f.hair_v = P[32]; f.glasses = (int)(P[33] + .5f); f.beard = P[34];
  f.back_style = (int)(P[35] + .5f); f.clothes = (int)(P[36] + .5f); f.ears = P[37]; f.lip_h = P[38]; f.seed = P[39]; f.blush = P[40]; f.side = P[41];
  f.head_cover = (int)(P[42] + .5f); f.wrap = rgb(P[43], P[44], P[45]); f.age = P[46]; f.jewel = (int)(P[47] + .5f);
  f.shirt = rgb(P[48], P[49], P[50]); f.lashes = P[51]; f.square = P[52];
  f.yaw = P[56]; f.pitch = P[57]; f.roll = P[58]; f.dx = P[59]; f.dy = P[60]; f.blink = P[61]; f.gaze_x = P[62]; f.gaze_y = P[63];
  f.brow = P[64]; f.smile = P[65];
  f.jaw = P[66]; f.width = P[67]; f.press = P[68]; f.fv = P[69]; f.tongue = P[70]; f.upper = P[71];
  return f;
}

FN Rgb background(Face f, float x, float y, float px) {
  Rgb c = lerp3(f.back1, f.back2, clampf(.5f + .5f * y + .12f * x, 0.f, 1.f));
  if (f.back_style == 1) {                                   // lights out of focus
    for (int i = 0; i < 6; i++) {
      float cx = -1.f + 2.f * hash1(f.seed + i * 1.7f), cy = -1.f + 1.5f * hash1(f.seed + i * 2.3f + 5.f), r = .08f + .14f * hash1(f.seed + i * 3.1f);
      float dx = x - cx, dy = y - cy;
      c = lerp3(c, light(f.back1, .6f), .26f * ramp(.04f, -.04f, sqrtf(dx * dx + dy * dy) - r));
    }
  } else if (f.back_style == 2) {                            // a room: window and shelves
    float s = f.seed > .5f ? 1.f : -1.f, wx = x - s * .62f, wy = y + .42f;
    float frame = box(wx, wy, .30f, .42f, .03f), pane = box(wx, wy, .265f, .385f, .01f);
    c = lerp3(c, rgb(.93f, .93f, .92f), cover(frame, px * 2.f));
    c = lerp3(c, lerp3(rgb(.60f, .77f, .93f), rgb(.93f, .95f, .95f), clampf(.5f + wy, 0.f, 1.f)), cover(pane, px * 3.f));
    c = lerp3(c, rgb(.93f, .93f, .92f), cover(fabsf(wx) - .014f, px * 2.f) * cover(pane, px));
    float sx = x + s * .64f;
    for (int k = 0; k < 2; k++) {
      float sy = y + .50f - k * .46f, cell = floorf((sx + .3f) / .10f);
      c = lerp3(c, shadow(f.back2, .6f), cover(box(sx, sy, .34f, .016f, .005f), px * 2.f));
      if (cell >= 0.f && cell < 6.f) {
        float bx = sx + .3f - (cell + .5f) * .10f, h = .08f + .06f * hash1(cell + k * 7.f + f.seed * 9.f);
        Rgb book = rgb(.35f + .4f * hash1(cell + k * 3.f + f.seed), .35f + .35f * hash1(cell * 2.f + k + f.seed), .35f + .35f * hash1(cell * 5.f + k));
        c = lerp3(c, lerp3(book, f.back1, .25f), cover(box(bx, sy + .016f + h, .040f, h, .006f), px * 2.f));
      }
    }
  } else if (f.back_style == 3) {                            // studio wall with a halo
    c = lerp3(c, light(c, .45f), ramp(.55f, -.5f, ellipse(x, y + .1f, .80f, .85f)));
  }
  return scale3(c, 1.f - .12f * (x * x + y * y));
}

FN Rgb hair_colour(Face f, float u, float v, float gloss) {
  Rgb c = scale3(f.hair, .80f + .27f * strands(u, v));
  return lerp3(c, light(f.hair, .55f), gloss);
}

FN float neck_shape(Face f, float bx, float hx, float by) { return box(bx * .6f + hx * .4f, by - .46f, .150f * f.head_w / .36f, .32f, .07f); }

// a pointed flap of a shirt collar on the right side, its tip at (tip, 0.84)
FN float collar_flap(float x, float y, float tip) {
  float inner = (.075f + (tip - .075f) * (y - .57f) / .27f) - x;
  float outer = (x - .215f) * .86f + (y - .64f) * .50f;
  return fmaxf(fmaxf(inner, outer), .585f + .12f * (x - .08f) - y) - .008f;
}

FN Rgb body(Face f, Rgb c, float bx, float by, float hx, float px) {
  float w = f.clothes == 5 ? .70f : .78f;
  float shoulders = joined(ellipse(bx, by - 1.16f, w, .48f), box(bx, by - 1.30f, w - .02f, .42f, .30f), .06f);
  float in = cover(shoulders, px);
  float lit = .90f + .16f * clampf(-bx * f.side * .9f - (by - .95f) * .7f, -1.f, 1.f);
  float fold = ramp(.06f, 0.f, fabsf(fabsf(bx) - .54f + .10f * (by - .9f))) * ramp(.80f, 1.f, by);
  Rgb cloth = shadow(f.cloth, lit - .16f * fold - .14f * ramp(-.10f, 0.f, shoulders));
  c = lerp3(c, cloth, in);
  Rgb under = shadow(f.skin, .80f - .20f * ramp(.34f, .06f, by - .42f - f.dy * .5f));    // shadow of the chin
  float neck = neck_shape(f, bx, hx, by);
  if (f.clothes == 0) {                                      // round neck
    float e = ellipse(bx, by - .68f, .245f, .155f);
    c = lerp3(c, shadow(cloth, .82f), cover(e - .030f, px) * in);
    c = lerp3(c, under, cover(fminf(neck, e), px));
  } else if (f.clothes == 1) {                               // jacket, shirt, sometimes a tie
    float opening = fmaxf(fabsf(bx) * 1.35f + (by - 1.12f) * .95f, .58f - by);
    c = lerp3(c, shadow(f.shirt, .96f - .12f * ramp(.75f, .6f, by)), cover(opening - .02f, px) * in);
    float lapel = fabsf(fabsf(bx) * 1.35f + (by - 1.12f) * .95f - .055f) - .050f;
    c = lerp3(c, shadow(cloth, 1.14f), cover(fmaxf(lapel, .66f - by), px) * in);
    c = lerp3(c, under, cover(fmaxf(neck, by - .74f), px));
    if (f.seed < .5f) {
      c = lerp3(c, shadow(f.wrap, .75f), cover(fmaxf(capsule(bx, by, 0.f, .82f, 0.f, 1.2f, .040f), .74f - by), px) * in);
      c = lerp3(c, shadow(f.wrap, .95f), cover(ellipse(bx, by - .775f, .050f, .040f), px));
    }
    float flap = collar_flap(fabsf(bx), by, .055f);
    c = lerp3(c, shadow(f.shirt, 1.f - .25f * ramp(-.02f, .01f, flap)), cover(flap, px));
  } else if (f.clothes == 2) {                               // high collar
    c = lerp3(c, under, cover(neck, px));
    float collar = box(bx, by - .68f, .200f * f.head_w / .36f, .11f, .05f);
    c = lerp3(c, shadow(f.cloth, .90f - .25f * ramp(.10f, .20f, fabsf(bx)) + .10f * sinf(bx * 45.f)), cover(collar, px));
  } else if (f.clothes == 3) {                               // V neck
    float v = fmaxf(fabsf(bx) * 1.25f + (by - 1.0f), .55f - by);
    c = lerp3(c, shadow(cloth, .80f), cover(v - .030f, px) * in);
    c = lerp3(c, shadow(f.skin, .90f), cover(v, px) * in);
    under = lerp3(under, shadow(f.skin, .90f), ramp(.56f, .71f, by));
    c = lerp3(c, under, cover(fmaxf(neck, fminf(v, by - .72f)), px));
  } else if (f.clothes == 4) {                               // open shirt collar
    float v = fmaxf(fabsf(bx) * 1.6f + (by - .96f), .55f - by);
    c = lerp3(c, shadow(f.skin, .88f), cover(v, px) * in);
    under = lerp3(under, shadow(f.skin, .88f), ramp(.56f, .71f, by));
    c = lerp3(c, under, cover(fmaxf(neck, fminf(v, by - .72f)), px));
    float flap = collar_flap(fabsf(bx), by, .10f);
    c = lerp3(c, shadow(f.cloth, 1.12f - .28f * ramp(-.03f, .01f, flap)), cover(flap, px));
    c = lerp3(c, shadow(cloth, .72f), cover(fmaxf(fabsf(bx) - .006f, .96f - by), px) * in);
  } else {                                                   // dress with a wide neckline
    float e = ellipse(bx, by - .70f, .40f, .20f);
    c = lerp3(c, under, cover(neck, px));
    c = lerp3(c, shadow(f.skin, .93f - .10f * ramp(.9f, .6f, by)), cover(e, px) * in);
    float bone = fabsf(by - .78f - .10f * fabsf(bx)) - .006f;
    c = lerp3(c, shadow(f.skin, .80f), .35f * ramp(.02f, 0.f, bone) * ramp(.30f, .22f, fabsf(bx)) * ramp(.05f, .08f, fabsf(bx)) * cover(e, px) * in);
  }
  if (f.jewel == 2 && (f.clothes == 0 || f.clothes == 3 || f.clothes == 5)) {
    float chain = fabsf(ellipse(bx, by - .62f, .17f, .19f)) - .007f;
    c = lerp3(c, rgb(.93f, .80f, .42f), cover(fmaxf(chain, .66f - by), px) * .9f);
    c = lerp3(c, rgb(.96f, .86f, .55f), cover(ellipse(bx, by - .82f, .018f, .022f), px));
  }
  return c;
}

FN Rgb back_hair(Face f, Rgb c, float x, float y, float px) {
  float d = 1.f, w = f.head_w, h = f.head_h, v = f.hair_v;
  if (f.hair_style == 2) d = joined(ellipse(x, y + .03f, w * 1.20f * v, h * 1.05f), box(x, y - .14f, w * 1.17f * v, .27f, .14f), .05f);
  else if (f.hair_style == 3) d = joined(ellipse(x, y + .03f, w * 1.19f * v, h * 1.06f), box(x, y - .38f, w * 1.22f * v, .50f, .18f), .06f);
  else if (f.hair_style == 7) d = joined(ellipse(x, y + .04f, w * 1.22f * v, h * 1.08f), box(x, y - .34f, w * (1.28f + .05f * sinf(y * 11.f)) * v, .48f, .22f), .06f);
  else if (f.hair_style == 4) d = fminf(ellipse(x, y + h * 1.14f, .165f * v, .14f * v), ellipse(x, y + .06f, w * 1.10f, h * 1.0f));
  else if (f.hair_style == 5) d = ellipse(x, y + .13f, w * 1.36f * v, h * 1.12f * v) + .018f * sinf(atan2f(y + .13f, x) * 15.f);
  else if (f.hair_style == 9) d = fminf(ellipse(x - .30f * f.side, y - .20f, .15f * v, .36f), ellipse(x, y + .06f, w * 1.10f, h * 1.0f));
  if (d > .5f) return c;
  float u = f.hair_style == 5 ? x * 16.f + 4.f * sinf(y * 14.f) : x * 22.f + 2.f * sinf(y * 5.f);
  Rgb hair = shadow(hair_colour(f, u, y * 6.f, 0.f), .66f + .2f * ramp(0.f, -.12f, d));
  return lerp3(c, hair, cover(d, px * 1.5f));
}

FN Rgb ears(Face f, Rgb c, float x, float y, float px) {
  float turn = x > 0.f ? -f.yaw * .07f : f.yaw * .07f;
  float ex = fabsf(x) - f.head_w * .985f + turn, ey = y - f.eye_y - .045f + f.pitch * .03f;
  float d = ellipse(ex + .15f * ey, ey, .055f * f.ears, .088f * f.ears);
  c = lerp3(c, shadow(f.skin, .90f - .14f * ramp(-.03f, .0f, d)), cover(d, px));
  c = lerp3(c, shadow(f.skin, .70f), .7f * ramp(.014f, -.014f, ellipse(ex + .004f, ey, .026f * f.ears, .052f * f.ears)));
  if (f.jewel >= 1) c = lerp3(c, rgb(.95f, .84f, .48f), cover(ellipse(ex, ey - .105f * f.ears, .020f, f.jewel == 1 ? .020f : .032f), px));
  return c;
}

// signed distance of the face outline; the jaw pulls the chin down
FN float face_shape(Face f, float x, float y) {
  float pull = f.jaw * .050f * (1.f - f.press);
  if (y > f.mouth_y - .06f) y -= pull * ramp(f.mouth_y - .06f, f.head_h, y);
  float w = f.head_w * (1.f - .55f * f.chin * ramp(.0f, f.head_h * 1.05f, y));
  float e = ellipse(x, y, w, f.head_h);
  if (y > 0.f && f.square > 0.f) e = lerp1(e, box(x, y, w * .93f, f.head_h * .985f, w * .62f), f.square * ramp(0.f, .25f, y));
  return e;
}

FN Rgb skin_of_face(Face f, float x, float y, float d) {
  float qx = x / f.head_w, qy = y / f.head_h;
  float z = sqrtf(fmaxf(0.f, 1.f - .92f * (qx * qx + qy * qy)));
  float lit = clampf(-qx * f.side * .42f - qy * .26f + z * .78f, -1.f, 1.f);
  Rgb c = shadow(f.skin, .74f + .30f * ramp(-.10f, .92f, lit));
  c = light(c, .12f * ramp(.62f, 1.f, lit));
  c = shadow(c, 1.f - .16f * ramp(-.05f, .005f, d));                       // the edge turns away
  float fx = x - f.yaw * .075f, fy = y - f.pitch * .055f;
  float cheek = ellipse(fabsf(fx) - .205f * f.head_w / .36f, fy - .125f + .02f * f.smile, .085f, .060f);
  c = lerp3(c, rgb(.93f, .42f, .38f), f.blush * .22f * ramp(.07f, -.05f, cheek));
  c = light(c, (.05f + .05f * fmaxf(f.smile, 0.f)) * ramp(.05f, -.05f, ellipse(fx + f.side * .19f, fy - .07f, .07f, .05f)));
  c = light(c, .06f * ramp(.10f, -.10f, ellipse(fx + f.side * .05f, fy + .27f, .16f, .09f)));
  float socket = ellipse(fabsf(fx) - f.eye_gap, fy - f.eye_y + .008f, .125f * f.eye, .085f * f.eye);
  c = shadow(c, 1.f - .13f * ramp(.045f, -.05f, socket));
  // age: forehead lines, bags, folds beside the nose (these also come with a smile)
  if (f.age > .01f) {
    for (int i = 0; i < 2; i++) {
      float line = fabsf(fy + .245f + .065f * i - .05f * fx * fx * 4.f + .03f * f.brow) - .003f;
      c = shadow(c, 1.f - .16f * f.age * ramp(.013f, 0.f, line) * ramp(.20f, .12f, fabsf(fx)));
    }
    float bag = fabsf(ellipse(fabsf(fx) - f.eye_gap, fy - f.eye_y - .020f, .078f * f.eye, .062f * f.eye)) - .003f;
    c = shadow(c, 1.f - .17f * f.age * ramp(.016f, 0.f, bag) * ramp(f.eye_y + .03f, f.eye_y + .06f, fy));
    float crow = fabsf(fy - f.eye_y - .004f - .45f * (fabsf(fx) - f.eye_gap - .10f)) - .002f;
    c = shadow(c, 1.f - .16f * f.age * ramp(.010f, 0.f, crow) * ramp(.02f, 0.f, fabsf(fabsf(fx) - f.eye_gap - .125f) - .018f));
  }
  float fold = capsule(fabsf(fx), fy, .062f * f.nose + .005f, .125f, f.mouth_w * 1.10f + .012f * f.width, f.mouth_y - .035f - .012f * f.smile, .002f);
  c = shadow(c, 1.f - (.20f * f.age + .10f * clampf(f.smile, 0.f, 1.f)) * ramp(.020f, 0.f, fold));
  return c;
}

FN Rgb nose(Face f, Rgb c, float x, float y, float in, float px) {
  float n = f.nose, nx = x - f.yaw * .115f, ny = y - f.pitch * .082f - .082f;
  float side = nx * f.side;
  float ridge = capsule(nx - .020f * n * f.side, ny, -.004f * f.side, -.17f, .012f * n * f.side, .0f, .004f);
  c = lerp3(c, shadow(c, .80f), .42f * ramp(.030f, .0f, ridge) * ramp(-.19f, -.08f, ny) * in);
  float ball = ellipse(nx, ny - .016f, .044f * n, .036f * n);
  c = lerp3(c, shadow(f.skin, .80f), .42f * ramp(.022f, -.016f, ellipse(nx - .008f * f.side, ny - .030f, .046f * n, .030f * n)) * in);
  c = lerp3(c, light(f.skin, .16f), .75f * ramp(.012f, -.026f, ball) * ramp(.030f, -.010f, side) * in);
  c = lerp3(c, shadow(f.skin, .82f), .55f * ramp(.012f, -.010f, ellipse(fabsf(nx) - .044f * n, ny - .018f, .018f * n, .020f * n)) * in * ramp(.0f, .02f, fabsf(nx) - .030f * n));
  float hole = ellipse(fabsf(nx) - .022f * n, ny - .040f * n, .0125f * n, .0065f * n);
  return lerp3(c, shadow(f.skin, .38f), .72f * cover(hole, px * 1.6f) * in);
}

FN Rgb eyes(Face f, Rgb c, float x, float y, float in, float px) {
  float fx = x - f.yaw * .075f, fy = y - f.pitch * .055f;
  float s = fx < 0.f ? -1.f : 1.f;
  float ex = (fx - s * f.eye_gap) * s;                       // outwards from the eye's middle
  float ey = fy - f.eye_y;
  float rx = .083f * f.eye, ry = .058f * f.eye, u = ex / rx;
  ey += .010f * f.eye * u;                                   // outer corner a little higher
  float arch = fmaxf(1.f - u * u, 0.f);
  float top = -ry * powf(arch, .60f) * (1.f - .04f * f.smile), bottom = ry * (.74f - .14f * fmaxf(f.smile, 0.f)) * powf(arch, .75f);
  float lid = lerp1(top * .88f, bottom - .003f, f.blink);
  float eye = fmaxf(fmaxf(top - ey, ey - bottom), (fabsf(ex) - rx) * .6f);
  float open = cover(eye, px * 1.2f) * in;
  Rgb white = shadow(rgb(.97f, .965f, .96f), 1.f - .26f * ramp(.012f, -ry, ey) - .14f * ramp(.55f, 1.f, fabsf(u)));
  float ix = ex * s - f.gaze_x * .028f * f.eye - f.yaw * .012f, iy = ey - f.gaze_y * .019f * f.eye + .003f, r = sqrtf(ix * ix + iy * iy), ir = .0435f * f.eye;
  Rgb iris = lerp3(shadow(f.iris, .62f), light(f.iris, .28f), ramp(-.9f, 1.f, iy / ir) * ramp(1.1f, .45f, r / ir));
  Rgb e = lerp3(white, shadow(f.iris, .40f), cover(r - ir, px * 1.3f));
  e = lerp3(e, iris, cover(r - ir * .86f, px * 1.6f));
  e = lerp3(e, rgb(.035f, .03f, .04f), cover(r - ir * .47f, px * 1.2f));
  e = shadow(e, 1.f - .35f * ramp(.016f, -.004f, ey - top));  // shadow of the lid
  float gx = ix + .013f * f.eye * f.side, gy = iy + .016f * f.eye;
  e = lerp3(e, rgb(1.f, 1.f, 1.f), cover(sqrtf(gx * gx + gy * gy) - .0105f * f.eye, px * 1.2f));
  e = lerp3(e, rgb(.90f, .62f, .58f), .8f * ramp(.012f, -.004f, ellipse(ex + rx * .93f, ey, .014f, .012f)));
  e = lerp3(e, shadow(f.skin, .86f - .10f * ramp(0.f, .02f, ey - top) * f.blink), cover(ey - lid, px));
  c = lerp3(c, e, open);
  float lash = fabsf(ey - lid + .002f) - (.0070f + .0045f * f.lashes * (.4f + .6f * ramp(-.6f, .9f, u)));
  lash = fmaxf(lash, fabsf(ex - .03f * rx * f.lashes) - rx * (1.02f + .10f * f.lashes));
  c = lerp3(c, rgb(.11f, .07f, .07f), cover(lash, px) * in * .93f);
  float low = fmaxf(fabsf(ey - bottom) - .0028f, fabsf(ex) - rx * .85f);
  c = lerp3(c, shadow(f.skin, .50f), cover(low, px * 1.6f) * in * .45f);
  float crease = fmaxf(fabsf(ey - top + .021f * f.eye) - .0028f, fabsf(ex) - rx * .90f);
  c = lerp3(c, shadow(f.skin, .55f), cover(crease, px * 1.8f) * in * .42f * (1.f - .6f * f.blink));
  // brow
  float bw = .098f * f.eye, t = clampf(ex / bw, -1.3f, 1.3f);
  float by = ey + .112f + .042f * f.brow + .010f * f.brow * (1.f - t);
  float curve = -.020f * (1.f - t * t) + .010f * t;
  float thick = f.brow_h * (.86f - .34f * t);
  float b = fmaxf(fabsf(by - curve) - thick, (fabsf(ex) - bw) * .8f);
  Rgb brow = lerp3(scale3(f.hair, .58f), shadow(f.skin, .45f), .25f);
  return lerp3(c, brow, ramp(.008f, -.008f, b) * in * .92f);
}

// The mouth's lines: opening H, half width w; used by the evaluation too (presenters.py opening()).
FN Rgb mouth(Face f, Rgb c, float x, float y, float in, float px) {
  float mx = x - f.yaw * .075f, m = y - f.pitch * .055f - f.mouth_y;
  float rounded = fmaxf(-f.width, 0.f), spread = fmaxf(f.width, 0.f), free = 1.f - f.press;
  float w = f.mouth_w * (1.f + .20f * spread - .42f * rounded - .06f * f.jaw + .05f * fmaxf(f.smile, 0.f));
  float H = .20f * f.jaw * free * (1.f - .25f * rounded) + .012f * free * fminf(1.f, f.jaw * 6.f) + .022f * f.upper * free;
  H = H * (1.f - .55f * f.fv) + .018f * f.fv + .012f * f.tongue * free;
  float thick = f.lip_h * (1.f - .45f * f.press + .35f * rounded);
  float u = mx / w, inner = powf(fmaxf(0.f, 1.f - u * u), .85f - .35f * rounded);
  float corner = .035f * f.smile + .012f * spread, lift = .012f * f.smile;
  float line = lift - corner * fminf(u * u, 2.f);
  float yu = line - (H * .30f + .010f * f.upper) * inner, yl = line + H * .70f * inner;
  float wo = w * 1.10f + thick * .15f, v = mx / wo, round_v = fmaxf(0.f, 1.f - v * v), outer = powf(round_v, .85f - .35f * rounded), full = powf(round_v, .72f);
  float bow = 1.f - .26f * expf(-mx * mx / .0007f) + .10f * expf(-(fabsf(mx) - .030f) * (fabsf(mx) - .030f) / .0006f);
  float line_o = lift - 1.15f * corner * fminf(v * v, 2.f);
  float you = line_o - (H * .30f + .010f * f.upper) * outer - thick * full * bow, ylo = line_o + H * .70f * outer + thick * 1.28f * full;
  float lips = fmaxf(fmaxf(you - m, m - ylo), (fabsf(mx) - wo) * .7f), on = cover(lips, px * 1.2f) * in;
  c = lerp3(c, shadow(f.skin, .72f), .50f * ramp(.020f, -.012f, ellipse(mx, m - ylo - .018f, w * .60f, .012f)) * in);
  c = lerp3(c, shadow(f.skin, .86f), .50f * ramp(.010f, -.006f, ellipse(mx, m - you + .030f, .010f, .022f)) * in);   // philtrum
  if (f.beard > .5f) {
    float moustache = fmaxf(fmaxf(you - .040f - m, m - you + .004f), fabsf(mx) - f.mouth_w * 1.08f);
    c = lerp3(c, scale3(f.hair, .75f), ramp(.012f, -.010f, moustache) * f.beard * .9f * in);
  }
  float upper_lip = m < .5f * (yu + yl) ? 1.f : 0.f;
  Rgb lip = upper_lip > .5f ? shadow(f.lip, .80f + .10f * ramp(yu, you, m)) : shadow(f.lip, 1.02f - .16f * ramp(.5f, 1.f, (m - yl) / (ylo - yl + 1e-4f)));
  lip = light(lip, .34f * ramp(.012f, -.004f, ellipse(mx + .012f * f.side, m - yl - thick * .50f, w * .34f, thick * .20f + .001f)) * (1.f - upper_lip));
  c = lerp3(c, lip, on);
  // heights above a steep edge are not distances: the slope turns them into such, so that corners stay smooth
  float q = .85f - .35f * rounded, slope = H * q * powf(fmaxf(1.f - u * u, .02f), q - 1.f) * 2.f * fabsf(u) / w;
  float above = (yu - m) / sqrtf(1.f + .09f * slope * slope), below = (m - yl) / sqrtf(1.f + .49f * slope * slope);
  float cavity = fmaxf(fmaxf(above, below), fabsf(mx) - w), hole = cover(cavity, px) * in;
  Rgb inside = lerp3(rgb(.20f, .045f, .055f), rgb(.38f, .09f, .10f), ramp(0.f, .12f, m));
  float ty = line + H * .70f + .012f - f.tongue * (.020f + H * .42f);
  Rgb tongue = lerp3(rgb(.76f, .34f, .36f), rgb(.90f, .50f, .50f), ramp(.025f, -.02f, m - ty));
  inside = lerp3(inside, tongue, cover(ellipse(mx, m - ty - .035f, w * .58f, .045f), px * 1.5f));
  float upper_teeth = fmaxf(m - (.0135f + .006f * f.fv) - line * .6f + .02f * u * u, fabsf(mx) - f.mouth_w * .78f);
  inside = lerp3(inside, lerp3(rgb(.97f, .955f, .925f), rgb(.78f, .75f, .74f), ramp(.35f, 1.f, fabsf(u))), cover(upper_teeth, px * 1.2f));
  float tooth = mx / (f.mouth_w * .2f), gap = fabsf(tooth - floorf(tooth + .5f)) * f.mouth_w * .2f;
  inside = shadow(inside, 1.f - .13f * ramp(.0045f, 0.f, gap) * cover(upper_teeth, px * 1.2f));
  float ly = line + H * .70f - .014f - .010f * u * u;
  float lower_teeth = fmaxf(ly - m, fabsf(mx) - f.mouth_w * .55f);
  inside = lerp3(inside, rgb(.88f, .86f, .835f), cover(lower_teeth, px * 1.2f) * ramp(.07f, .12f, H) * (1.f - .8f * f.tongue));
  c = lerp3(c, shadow(inside, 1.f - .30f * ramp(.012f, -.004f, m - yu)), hole);
  float seam = fmaxf(fabsf(m - .5f * (yu + yl)) - .0052f, fabsf(mx) - w);
  return lerp3(c, shadow(f.lip, .36f), cover(seam, px * 1.2f) * in * ramp(.02f, .004f, yl - yu));
}

FN Rgb front_hair(Face f, Rgb c, float hx, float hy, float in, float px) {
  float x = hx - f.yaw * .02f, y = hy - f.pitch * .02f, w = f.head_w, h = f.head_h, v = f.hair_v, line, out;
  int s = f.hair_style;
  if (s == 0) {                                              // cropped
    float d = fmaxf(ellipse(hx, hy + .01f, w * 1.008f, h * 1.008f), hy + h * .50f - .6f * hx * hx);
    return lerp3(c, lerp3(f.skin, scale3(f.hair, .9f), .70f), ramp(.022f, -.022f, d) * .92f);
  }
  if (s == 8) {                                              // hair at the sides only
    float d = fmaxf(ellipse(hx, hy + .02f, w * 1.05f, h * .98f), w * .84f + .12f * hy - fabsf(hx));
    d = fmaxf(d, fmaxf(hy - .06f, -hy - h * .66f));
    return lerp3(c, hair_colour(f, hx * 30.f, hy * 10.f, 0.f), ramp(.018f, -.018f, d));
  }
  float ax = fabsf(x);
  if (s == 1) { line = -h * .54f + .38f * (x - .1f * f.side) * (x - .1f * f.side) / w + .11f * x * f.side; out = ellipse(x, y + .055f * v, w * 1.07f, h * 1.01f); }
  else if (s == 2 || s == 3) {
    line = -h * .50f + 1.05f * x * x / w + (s == 3 ? .10f * fabsf(x - .05f) : 0.f);
    line = lerp1(line, s == 2 ? .30f : .46f, ramp(w * .70f, w * .86f, ax));
    out = ellipse(x, y + .05f * v, w * 1.12f, h * 1.04f);
    if (y > 0.f) out = ax - w * 1.12f;
  } else if (s == 7) {                                       // middle parting, waves
    line = -h * .66f + .95f * powf(ax, 1.2f) / w * .42f;
    line = lerp1(line, .52f, ramp(w * .72f + .02f * sinf(y * 11.f), w * .88f + .02f * sinf(y * 11.f), ax));
    out = ellipse(x, y + .06f * v, w * 1.15f, h * 1.05f);
    if (y > 0.f) out = ax - w * (1.16f + .04f * sinf(y * 11.f));
  } else if (s == 4 || s == 9) { line = -h * .62f + .52f * x * x / w; out = ellipse(x, y + .035f, w * 1.05f, h * 1.0f); }
  else if (s == 5) { line = -h * .52f + .5f * x * x / w + .012f * sinf(x * 42.f); out = ellipse(x, y + .10f, w * 1.22f * v, h * 1.06f) + .014f * sinf(atan2f(y, x) * 15.f); }
  else { line = -h * .60f + .60f * x * x / w - .045f * sinf(x * 8.f * f.side + 1.f); out = joined(ellipse(x, y + .04f, w * 1.06f, h * 1.0f), ellipse(x - .03f * f.side, y + h * .93f, w * .80f, .15f * v), .04f); }
  float d = fmaxf(out, (y - f.pitch * .03f - line) * .8f);
  float u = s == 5 ? x * 18.f + 4.f * sinf(y * 15.f) : (s == 1 || s == 6 ? (x * .8f + y * .5f * f.side) * 26.f : x * 24.f / (1.15f + y));
  float gloss = s == 5 ? 0.f : .30f * ramp(.11f, .0f, fabsf(y + h * .70f + .30f * x * x - .10f * f.side * -x)) * (.5f + .5f * strands(u, y * 5.f));
  Rgb hair = hair_colour(f, u, y * 5.f, gloss);
  hair = shadow(hair, 1.f - .25f * ramp(-.06f, .0f, out) - .10f * ramp(-.05f, 0.f, d));
  c = lerp3(c, shadow(c, .74f), ramp(.050f, -.02f, d) * in * .60f * (1.f - cover(d, px)));    // shadow on the forehead
  // long locks pass into the hair behind
  float fade = s == 3 || s == 7 ? ramp(.42f, .20f, y) : 1.f;
  return lerp3(c, hair, cover(d, px * 1.8f) * fade);
}

FN Rgb head_cover(Face f, Rgb c, float x, float y, float bx, float by, float face, float in, float px) {
  float w = f.head_w, h = f.head_h, sx = x - f.yaw * .02f, sy = y - f.pitch * .02f;
  if (f.head_cover == 1) {                                   // headscarf around face, neck and shoulders
    float hood = ellipse(sx, sy + .035f, w * 1.20f, h * 1.10f);
    float drape = joined(ellipse(bx * .8f + sx * .2f, by - .66f, .40f, .26f), box(bx, by - .90f, .33f, .30f, .20f), .10f);
    float outer = joined(hood, drape, .10f);
    float line = -h * .56f + .30f * sx * sx / w;
    float hole = fmaxf(face + .020f - .012f * ramp(.1f, .3f, y), line - (sy - f.pitch * .03f));
    float d = fmaxf(outer, -hole);
    float folds = .5f + .5f * sinf(sx * 5.f + 9.f * (outer + hole) + 3.f * f.seed);
    Rgb cloth = shadow(f.wrap, .82f + .18f * folds - .22f * ramp(-.06f, .0f, outer));
    cloth = shadow(cloth, 1.f - .25f * ramp(.05f, .0f, hole) * (1.f - ramp(-.02f, -.2f, sy)));
    cloth = light(cloth, .10f * ramp(.14f, 0.f, fabsf(sy + h * .80f + .3f * sx * sx)));
    c = lerp3(c, shadow(c, .70f), ramp(-.045f, .0f, hole) * in * .55f);
    return lerp3(c, cloth, cover(d, px));
  }
  if (f.head_cover == 2) {                                   // turban
    float line = -h * .50f + .55f * sx * sx / w * (1.f + .25f * sx * f.side);
    float outer = joined(ellipse(sx, sy + h * .66f, w * 1.22f, h * .62f), ellipse(sx, sy + h * .98f, w * .80f, h * .34f), .08f);
    float d = fmaxf(outer, sy - f.pitch * .03f - line);
    float t = fabsf(sx) * 1.1f + (sy + h * .55f) * 1.5f;
    float bands = .5f + .5f * sinf(t * 24.f * .7f);
    Rgb cloth = shadow(f.wrap, .76f + .26f * bands - .20f * ramp(-.07f, 0.f, outer));
    c = lerp3(c, shadow(c, .70f), ramp(.05f, -.01f, d) * in * .55f * (1.f - cover(d, px)));
    return lerp3(c, cloth, cover(d, px));
  }
  float line = -h * .46f + .10f * sx * sx / w;               // knitted cap or brimmed hat
  if (f.head_cover == 3) {
    float outer = ellipse(sx, sy + .08f, w * 1.12f, h * 1.06f), d = fmaxf(outer, sy - f.pitch * .03f - line);
    float band = sy - f.pitch * .03f - line + .11f;
    Rgb cloth = shadow(f.wrap, .88f + .10f * sinf(sx * 40.f) - .20f * ramp(-.07f, 0.f, outer) + .08f * ramp(-.01f, .01f, band));
    c = lerp3(c, shadow(c, .72f), ramp(.045f, -.01f, d) * in * .55f * (1.f - cover(d, px)));
    return lerp3(c, shadow(cloth, 1.f - .25f * ramp(.014f, .0f, fabsf(band))), cover(d, px));
  }
  float crown = fmaxf(joined(ellipse(sx, sy + h * .80f, w * .98f, h * .46f), box(sx, sy + h * .72f, w * .98f, h * .30f, .08f), .06f), sy + h * .50f);
  float brim = ellipse(sx, sy + h * .52f - f.pitch * .03f - .16f * sx * sx, w * 1.55f, .058f);
  c = lerp3(c, shadow(c, .66f), ramp(.10f, .0f, brim) * in * .65f);
  Rgb felt = shadow(f.wrap, 1.f - .25f * ramp(-.10f, 0.f, crown) - .12f * sx * f.side);
  felt = lerp3(felt, shadow(f.shirt, .5f), cover(fmaxf(-(sy + h * .68f), sy + h * .52f), px));
  c = lerp3(c, felt, cover(crown, px));
  return lerp3(c, shadow(f.wrap, .86f - .16f * ramp(-.02f, .0f, brim)), cover(brim, px));
}

FN Rgb glasses(Face f, Rgb c, float hx, float hy, float px) {
  float x = hx - f.yaw * .080f, y = hy - f.pitch * .058f - f.eye_y, ex = fabsf(x) - f.eye_gap;
  float lens = f.glasses == 2 ? box(ex, y - .006f, .118f, .084f, .032f) : (f.glasses == 3 ? box(ex, y - .002f - .10f * ex, .122f, .076f, .060f) : ellipse(ex, y - .006f, .110f, .098f));
  Rgb frame = f.glasses == 3 ? rgb(.35f, .20f, .12f) : rgb(.13f, .12f, .14f);
  float rim = fabsf(lens) - (f.glasses == 1 ? .0060f : .0085f);
  c = lerp3(c, rgb(.90f, .95f, 1.f), cover(lens, px) * (.05f + .10f * ramp(.03f, -.05f, y + ex * .8f)));
  float bridge = fmaxf(fabsf(y + .020f - .1f * x * x) - .0075f, fabsf(x) - f.eye_gap + .106f);
  float arm = fmaxf(fmaxf(fabsf(y + .012f) - .0075f, f.eye_gap + .108f - fabsf(x)), fabsf(hx) - f.head_w * 1.0f);
  return lerp3(c, frame, cover(fminf(rim, fminf(bridge, arm)), px) * .94f);
}

// Everything in front of the background `c`; x, y and px in the presenter's own coordinates.
FN Rgb presenter_over(Face f, Rgb c, float x, float y, float px) {
  float bx = x - f.dx * .35f, by = y - f.dy * .25f + .11f;   // the shoulders follow the head a little
  float cr = cosf(f.roll), sr = sinf(f.roll), ox = x - f.dx, oy = y - f.dy - .30f;
  float hx = cr * ox + sr * oy, hy = -sr * ox + cr * oy + .36f;   // the head turns about the neck
  int scarf = f.head_cover == 1;
  if (!scarf) c = back_hair(f, c, hx + f.yaw * .05f, hy + f.pitch * .03f, px);
  c = body(f, c, bx, by, hx, px);
  if (!scarf) c = ears(f, c, hx, hy, px);
  float d = face_shape(f, hx, hy), in = cover(d, px);
  if (d < .1f) {
    Rgb skin = skin_of_face(f, hx, hy, d);
    float fx = hx - f.yaw * .075f, fy = hy - f.pitch * .055f;
    if (f.beard > .01f) {
      float m = ramp(.09f, .20f, fy + .25f * fabsf(hx) - .02f) * ramp(-.012f, .030f, ellipse(fx, fy - f.mouth_y, .105f, .052f));
      skin = lerp3(skin, scale3(f.hair, .70f + .22f * strands(hx * 26.f, hy * 12.f)), f.beard * m * .95f);
    }
    c = lerp3(c, skin, in);
    c = nose(f, c, hx, hy, in, px);
    c = eyes(f, c, hx, hy, in, px);
    c = mouth(f, c, hx, hy, in, px);
  }
  if (f.head_cover == 0 || f.head_cover == 3 || f.head_cover == 4) c = front_hair(f, c, hx, hy, in, px);
  if (f.head_cover > 0) c = head_cover(f, c, hx, hy, bx, by, d, in, px);
  if (f.glasses > 0) c = glasses(f, c, hx, hy, px);
  return c;
}

FN Rgb presenter_pixel(float x, float y, const float* P, float px) {
  Face f = face_of(P);
  x *= .79f; y = y * .79f + .03f; px *= .79f;
  Rgb c = presenter_over(f, background(f, x, y, px), x, y, px);
  return rgb(clampf(c.r, 0.f, 1.f), clampf(c.g, 0.f, 1.f), clampf(c.b, 0.f, 1.f));
}

// How much the presenter covers the background, 0..1.  Every layer mixes linearly with what is behind it, so white and
// black behind the same presenter differ by exactly what shines through.
FN float presenter_matte(float x, float y, const float* P, float px) {
  Face f = face_of(P);
  x *= .79f; y = y * .79f + .03f; px *= .79f;
  return clampf(1.f - (presenter_over(f, rgb(1.f, 1.f, 1.f), x, y, px).g - presenter_over(f, rgb(0.f, 0.f, 0.f), x, y, px).g), 0.f, 1.f);
}
