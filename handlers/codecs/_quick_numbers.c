/* Reads JSON tensors of plain numbers straight into float32, and looks for numbers that are not finite.

   It is an accelerator and decides nothing: what it does not understand at once it gives back (None), and
   handlers/codecs/tensors.py reads it by simdjson, or names the first wrong place. So there are no messages here.

   INVARIANT: what it reads has the bits that the slower paths give: the decimal number rounded to double, and that to
   float32. A number of at most 2^53 without its point, times or through a power of ten of at most 10^22, is rounded
   once, hence right (W. D. Clinger, "How to read floating point numbers accurately", 1990). Another one is within two
   roundings of the right double; if both ends of a wider interval are the same float32, so is the right double, because
   rounding is monotonic. Otherwise it is given back.

   INVARIANT: nothing is read past the body. Its last byte is checked to be `}` first, and every loop over digits, white
   space and brackets ends there at the latest; keys are compared within bounds. */

#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <float.h>
#include <stdint.h>
#include <string.h>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

enum { MOST_AXES = 8, MOST_TENSORS = 16, MOST_POWER = 22 };

#define MOST_EXACT (1ll << 53) /* of integers that a double holds exactly */
#define MOST_VALUE 1000000000000000000u /* one digit more always fits into 64 bits, as eight do for a ten millionth */

static const double POWERS[MOST_POWER + 1] = {1e0,  1e1,  1e2,  1e3,  1e4,  1e5,  1e6,  1e7,  1e8,  1e9,  1e10, 1e11,
                                              1e12, 1e13, 1e14, 1e15, 1e16, 1e17, 1e18, 1e19, 1e20, 1e21, 1e22};

typedef struct {
    const char *name;
    Py_ssize_t name_size;
    Py_ssize_t axes;
    Py_ssize_t lengths[MOST_AXES]; /* -1 until the first list of that depth has ended */
    PyObject *numbers;             /* a bytearray; NULL until the tensor was found in the body */
    float *at, *limit;             /* where the next number goes, and the end of the memory */
} Tensor;

static inline int is_digit(char c) { return (unsigned char)(c - '0') < 10; }

static inline const char *skip_space(const char *p) {
    while (*p == ' ' || *p == '\n' || *p == '\t' || *p == '\r') p++;
    return p;
}

static const uint32_t SCALES[9] = {1, 10, 100, 1000, 10000, 100000, 1000000, 10000000, 100000000};

/* `number`, which has no sign, with one if `negative` is 1: without a branch, which signs would mispredict. */
static inline float copy_sign(float number, uint32_t negative) {
    uint32_t bits;
    memcpy(&bits, &number, 4);
    bits |= negative << 31;
    memcpy(&number, &bits, 4);
    return number;
}

/* The number of which `digits` has the eight digits, a byte each, the first one lowest. */
static inline uint64_t sum_digits(uint64_t digits) {
    digits = digits * 10 + (digits >> 8);
    return ((digits & 0x000000FF000000FFu) * 0x000F424000000064u +
            ((digits >> 16) & 0x000000FF000000FFu) * 0x0000271000000001u) >> 32;
}

/* Append the digits at `p`, at most eight, to `*value` and return how many they are; 8 bytes can be read there.

   Eight characters are looked at together, because a loop over digits whose number varies mispredicts its end: 12 ns
   a number. A character is a digit if its upper half is 3 and its lower one, plus 6, has no fifth bit; a carry can only
   spoil characters behind the first that is none. See D. Lemire, "Number parsing at a gigabyte per second", 2021. */
static inline int take_digits(const char *p, uint64_t *value) {
    uint64_t chars, others;
    memcpy(&chars, p, 8);
    chars ^= 0x3030303030303030u;
    others = (chars | (chars + 0x0606060606060606u)) & 0xF0F0F0F0F0F0F0F0u;
    int count = others ? __builtin_ctzll(others) / 8 : 8;
    if (!count) return 0;
    *value = *value * SCALES[count] + sum_digits(chars << (64 - 8 * count)); /* as if zeros were in front */
    return count;
}

/* Read one number at `p`; returns what follows it, NULL where it is no number or not a plain one.

   Nothing here branches on what differs from number to number of a body: sign, first digit, count of digits. */
static inline const char *read_number(const char *p, const char *end, float *out) {
    int power = 0, has_point = 0;
    uint32_t negative = *p == '-';
    p += negative;
    if (!is_digit(*p)) return NULL;
    uint64_t value = (uint64_t)(*p++ - '0');
    if (is_digit(*p)) {
        if (!value) return NULL;
        while (is_digit(*p) && value < MOST_VALUE) value = value * 10 + (uint64_t)(*p++ - '0');
        if (is_digit(*p)) return NULL;
    }
    if (*p == '.') {
        const char *first = ++p;
        has_point = 1;
        if (!is_digit(*p)) return NULL;
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
        while (end - p >= 8 && value < MOST_VALUE / 10000000) {
            int taken = take_digits(p, &value);
            p += taken;
            if (taken < 8) break;
        }
#endif
        while (is_digit(*p) && value < MOST_VALUE) value = value * 10 + (uint64_t)(*p++ - '0');
        if (is_digit(*p) || p - first > MOST_POWER) return NULL;
        power = -(int)(p - first);
    }
    if (*p == 'e' || *p == 'E') {
        has_point = 1; /* what has an exponent is no integer either */
        p++;
        int minus = *p == '-', exponent = 0;
        if (*p == '-' || *p == '+') p++;
        if (!is_digit(*p)) return NULL;
        for (const char *begin = p; is_digit(*p); p++) {
            if (p - begin >= 2) return NULL;
            exponent = exponent * 10 + (*p - '0');
        }
        power += minus ? -exponent : exponent;
    }
    if (power > MOST_POWER || power < -MOST_POWER) return NULL;
    double found = (double)value;
    found = power < 0 ? found / POWERS[-power] : found * POWERS[power];
    if (!(found <= FLT_MAX)) return NULL;
    float number = (float)found;
    if (value > (uint64_t)MOST_EXACT && ((float)(found * (1 - 0x1p-50)) != number || (float)(found * (1 + 0x1p-50)) != number))
        return NULL;
    /* JSON's -0 is an integer, which has no sign at zero; -0.0 has one. */
    *out = copy_sign(number, negative & (uint32_t)(has_point | (value != 0)));
    return p;
}

#if defined(__SSE2__)
/* The value of the `count` digits (at most eight) in front of `end`, or -1 if others are among them. */
static inline int64_t read_digits_before(const char *end, unsigned count) {
    uint64_t chars, others;
    memcpy(&chars, end - 8, 8);
    unsigned others_before = 64 - 8 * count;
    chars = ((chars ^ 0x3030303030303030u) >> others_before) << others_before; /* as if zeros were in front */
    others = (chars | (chars + 0x0606060606060606u)) & 0xF0F0F0F0F0F0F0F0u;
    return others ? -1 : (int64_t)sum_digits(chars);
}

/* Read a number like -12.345, of at most eight digits on either side of the point, with a comma or bracket right behind.

   The end is found before the number is read, so that the processor goes on with the next number meanwhile: reading
   each number's length from its digits takes twice as long. Returns NULL for other numbers, which `read_number` reads. */
static inline const char *read_short_number(const char *p, const char *begin, const char *end, float *out) {
    if (p - begin < 8 || end - p < 16) return NULL;
    __m128i chars = _mm_loadu_si128((const __m128i *)p);
    __m128i ends = _mm_or_si128(_mm_cmpeq_epi8(chars, _mm_set1_epi8(',')), _mm_cmpeq_epi8(chars, _mm_set1_epi8(']')));
    unsigned found = (unsigned)_mm_movemask_epi8(ends);
    unsigned points = (unsigned)_mm_movemask_epi8(_mm_cmpeq_epi8(chars, _mm_set1_epi8('.')));
    if (!found || !points) return NULL;
    unsigned negative = *p == '-', length = (unsigned)__builtin_ctz(found), point = (unsigned)__builtin_ctz(points);
    unsigned whole = point - negative, part = length - point - 1; /* huge where the point is elsewhere */
    if (whole - 1 > 7 || part - 1 > 7 || (whole > 1 && p[negative] == '0')) return NULL;
    int64_t high = read_digits_before(p + point, whole), low = read_digits_before(p + length, part);
    if (high < 0 || low < 0) return NULL;
    int64_t value = high * (int64_t)SCALES[part] + low;
    if (value > MOST_EXACT) return NULL;
    *out = copy_sign((float)((double)value / POWERS[part]), negative);
    return p + length;
}
#else
static inline const char *read_short_number(const char *p, const char *begin, const char *end, float *out) {
    (void)p, (void)begin, (void)end, (void)out;
    return NULL;
}
#endif

/* Read a list of `tensor` at `depth`, of which `p` is the bracket; returns what follows it, NULL to give the body back. */
static const char *read_list(Tensor *tensor, Py_ssize_t depth, const char *p, const char *begin, const char *end) {
    Py_ssize_t length = 0;
    if (*p != '[') return NULL;
    p++;
    do {
        p = skip_space(p);
        if (length == tensor->lengths[depth]) return NULL;
        if (depth + 1 < tensor->axes) {
            if (!(p = read_list(tensor, depth + 1, p, begin, end))) return NULL;
        } else {
            if (tensor->at == tensor->limit) return NULL;
            const char *next = read_short_number(p, begin, end, tensor->at);
            if (!(p = next ? next : read_number(p, end, tensor->at))) return NULL;
            tensor->at++;
        }
        length++;
        p = skip_space(p);
    } while (*p++ == ',');
    if (p[-1] != ']') return NULL;
    if (tensor->lengths[depth] == -1) tensor->lengths[depth] = length;
    return length == tensor->lengths[depth] ? p : NULL;
}

/* Give the tensor memory: as much as its shape needs, or as many numbers as the rest of the body can hold. */
static int give_memory(Tensor *tensor, Py_ssize_t rest) {
    Py_ssize_t most = rest / 2 + 1, count = 1;
    for (Py_ssize_t i = 0; i < tensor->axes && count <= most; i++)
        count *= tensor->lengths[i] == -1 ? most + 1 : tensor->lengths[i];
    if (count > most) count = most;
    tensor->numbers = PyByteArray_FromStringAndSize(NULL, count * (Py_ssize_t)sizeof(float));
    if (!tensor->numbers) return -1;
    tensor->at = (float *)PyByteArray_AsString(tensor->numbers);
    tensor->limit = tensor->at + count;
    return 0;
}

/* Read a body of exactly these tensors. 1: read, 0: given back, -1: an exception. */
static int read_body(Tensor *tensors, Py_ssize_t count, const char *p, const char *end) {
    const char *begin = p;
    p = skip_space(p);
    if (*p++ != '{') return 0;
    for (Py_ssize_t found = 0; found < count; found++) {
        Tensor *tensor = NULL;
        p = skip_space(p);
        if (*p++ != '"') return 0;
        for (Py_ssize_t i = 0; i < count && !tensor; i++) {
            Tensor *each = tensors + i;
            if (!each->numbers && end - p > each->name_size && p[each->name_size] == '"' &&
                !memcmp(p, each->name, (size_t)each->name_size))
                tensor = each;
        }
        if (!tensor) return 0;
        p = skip_space(p + tensor->name_size + 1);
        if (*p++ != ':') return 0;
        if (give_memory(tensor, end - p) < 0) return -1;
        if (!(p = read_list(tensor, 0, skip_space(p), begin, end))) return 0;
        p = skip_space(p);
        if (*p++ != (found + 1 < count ? ',' : '}')) return 0;
    }
    return p == end;
}

/* What the wanted names (bytes without quotes and escapes) and shapes are. 1: taken, 0: too many, -1: an exception. */
static int take_wanted(Tensor *tensors, PyObject *names, PyObject *shapes) {
    Py_ssize_t count = PyTuple_Size(names);
    if (count < 0 || PyTuple_Size(shapes) != count) {
        if (!PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "as many names as shapes are needed");
        return -1;
    }
    if (count < 1 || count > MOST_TENSORS) return 0;
    for (Py_ssize_t i = 0; i < count; i++) {
        Tensor *tensor = tensors + i;
        PyObject *shape = PyTuple_GetItem(shapes, i);
        tensor->numbers = NULL;
        if (PyBytes_AsStringAndSize(PyTuple_GetItem(names, i), (char **)&tensor->name, &tensor->name_size) < 0) return -1;
        if ((tensor->axes = PyTuple_Size(shape)) < 0) return -1;
        if (tensor->axes < 1 || tensor->axes > MOST_AXES) return 0;
        for (Py_ssize_t axis = 0; axis < tensor->axes; axis++) {
            Py_ssize_t length = PyLong_AsSsize_t(PyTuple_GetItem(shape, axis));
            if (length == -1 && PyErr_Occurred()) return -1;
            if (length != -1 && length < 1) return 0;
            tensor->lengths[axis] = length;
        }
    }
    return 1;
}

/* (numbers, lengths) of one tensor that was read. */
static PyObject *make_found(Tensor *tensor) {
    Py_ssize_t size = (char *)tensor->at - PyByteArray_AsString(tensor->numbers);
    if (size != PyByteArray_Size(tensor->numbers) && PyByteArray_Resize(tensor->numbers, size) < 0) return NULL;
    PyObject *lengths = PyTuple_New(tensor->axes);
    for (Py_ssize_t axis = 0; lengths && axis < tensor->axes; axis++) {
        PyObject *length = PyLong_FromSsize_t(tensor->lengths[axis]);
        if (!length || PyTuple_SetItem(lengths, axis, length) < 0) Py_CLEAR(lengths);
    }
    PyObject *found = lengths ? PyTuple_Pack(2, tensor->numbers, lengths) : NULL;
    Py_XDECREF(lengths);
    return found;
}

PyDoc_STRVAR(read_tensors_doc,
             "read_tensors(body, names, shapes)\n--\n\n"
             "Read a JSON object of exactly these tensors -> ((float32 as a bytearray, lengths), ...), None if unusual.");

static PyObject *read_tensors(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs) {
    if (nargs != 3) return PyErr_Format(PyExc_TypeError, "read_tensors takes 3 arguments, not %zd", nargs);
    Tensor tensors[MOST_TENSORS];
    Py_ssize_t count = PyTuple_Size(args[1]);
    int state = count < 0 ? -1 : take_wanted(tensors, args[1], args[2]);
    if (state < 0) return NULL;
    if (!state) Py_RETURN_NONE;
    Py_buffer body;
    if (PyObject_GetBuffer(args[0], &body, PyBUF_SIMPLE) < 0) return NULL;
    const char *begin = body.buf, *end = begin + body.len;
    while (end > begin && (end[-1] == ' ' || end[-1] == '\n' || end[-1] == '\t' || end[-1] == '\r')) end--;
    state = end > begin && end[-1] == '}' ? read_body(tensors, count, begin, end) : 0;
    PyBuffer_Release(&body);
    PyObject *found = state > 0 ? PyTuple_New(count) : NULL;
    for (Py_ssize_t i = 0; found && i < count; i++) {
        PyObject *each = make_found(tensors + i);
        if (!each || PyTuple_SetItem(found, i, each) < 0) Py_CLEAR(found);
    }
    for (Py_ssize_t i = 0; i < count; i++) Py_XDECREF(tensors[i].numbers);
    if (!found && !state) Py_RETURN_NONE;
    return found;
}

PyDoc_STRVAR(are_finite_doc,
             "are_finite(numbers)\n--\n\n"
             "Return whether each number of a C-contiguous float32 array is finite. Raises ValueError for another array.");

static PyObject *are_finite(PyObject *Py_UNUSED(module), PyObject *numbers) {
    Py_buffer view;
    if (PyObject_GetBuffer(numbers, &view, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT) < 0) return NULL;
    if (!view.format || strcmp(view.format, "f")) {
        PyBuffer_Release(&view);
        PyErr_SetString(PyExc_ValueError, "only arrays of float32 can be checked");
        return NULL;
    }
    const char *at = view.buf;
    Py_ssize_t count = view.len / 4;
    uint32_t found = 0;
    for (Py_ssize_t i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, at + 4 * i, 4);
        found |= (bits & 0x7F800000u) == 0x7F800000u; /* the exponent of infinities and of what is no number */
    }
    PyBuffer_Release(&view);
    return PyBool_FromLong(!found);
}

static PyMethodDef methods[] = {
    {"read_tensors", (PyCFunction)(void (*)(void))read_tensors, METH_FASTCALL, read_tensors_doc},
    {"are_finite", are_finite, METH_O, are_finite_doc},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {{0, NULL}};

static struct PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "_quick_numbers",
    .m_doc = "Reads plain JSON tensors into float32; see handlers/codecs/quick_numbers.py.",
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__quick_numbers(void) { return PyModuleDef_Init(&definition); }
