// CPU renderer:  cc -O3 -march=native -ffast-math -shared -fPIC render.c -o librender_cpu.so -lm
#include <math.h>
#include <stddef.h>
#define FN static inline
#include "presenter.h"

static unsigned char byte_of(float v) { return (unsigned char)(v * 255.f + .5f); }

// parameters [n][72] -> out [n][3][size][size]
void render(const float* parameters, unsigned char* out, int n, int size) {
  size_t plane = (size_t)size * size;
  for (int f = 0; f < n; f++)
    for (int j = 0; j < size; j++)
      for (int i = 0; i < size; i++) {
        Rgb c = presenter_pixel((i + .5f) * 2.f / size - 1.f, (j + .5f) * 2.f / size - 1.f, parameters + (size_t)f * PRESENTER_PARAMETERS, 2.f / size);
        unsigned char* o = out + f * 3 * plane + (size_t)j * size + i;
        o[0] = byte_of(c.r); o[plane] = byte_of(c.g); o[2 * plane] = byte_of(c.b);
      }
}

// parameters [n][72] -> out [n][size][size]: the presenter's matte, 255 where nothing of the background is seen
void render_matte(const float* parameters, unsigned char* out, int n, int size) {
  for (int f = 0; f < n; f++)
    for (int j = 0; j < size; j++)
      for (int i = 0; i < size; i++)
        *out++ = byte_of(presenter_matte((i + .5f) * 2.f / size - 1.f, (j + .5f) * 2.f / size - 1.f, parameters + (size_t)f * PRESENTER_PARAMETERS, 2.f / size));
}
