/* Preloaded into the server's processes: the wall clock plus the nanoseconds in the file CHAOS_CLOCK, which may change.
 * Only the wall clock moves, as when an operator or NTP steps it. Times of files stay the kernel's. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
#include <dlfcn.h>

static const volatile int64_t *offset_ns;
static int (*true_clock)(clockid_t, struct timespec *);

__attribute__((constructor)) static void open_clock(void) {
    true_clock = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    const char *path = getenv("CHAOS_CLOCK");
    int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (fd < 0)
        return;
    void *found = mmap(NULL, sizeof *offset_ns, PROT_READ, MAP_SHARED, fd, 0);
    if (found != MAP_FAILED)
        offset_ns = found;
    close(fd);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = true_clock ? true_clock(clock, now) : (int)syscall(SYS_clock_gettime, clock, now);
    if (!failed && offset_ns && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) {
        int64_t ns = now->tv_nsec + *offset_ns % 1000000000;
        now->tv_sec += *offset_ns / 1000000000 + (ns >= 1000000000) - (ns < 0);
        now->tv_nsec = ns + (ns < 0) * 1000000000 - (ns >= 1000000000) * 1000000000;
    }
    return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec found;
    (void)zone;
    int failed = clock_gettime(CLOCK_REALTIME, &found);
    now->tv_sec = found.tv_sec;
    now->tv_usec = found.tv_nsec / 1000;
    return failed;
}

time_t time(time_t *into) {
    struct timespec found;
    clock_gettime(CLOCK_REALTIME, &found);
    if (into)
        *into = found.tv_sec;
    return found.tv_sec;
}
