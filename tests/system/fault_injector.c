/* Preloaded: makes calls on files under one folder fail, wait, or do less than requested
   (tests/system/fault_injection_test.py).

   injector_arm() starts it; before that, and for all other files, calls pass through. The calls of the chosen
   operations under the folder are counted; of `count` calls from number `first` on, each is broken with a probability.
*/
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { OPEN = 1, READ = 2, WRITE = 4, RENAME = 8, FSYNC = 16, UNLINK = 32 };

static struct {
  int armed, only;       /* only: bits of the operations to break */
  char folder[PATH_MAX]; /* symlinks resolved, no trailing slash */
  long first, count;     /* the calls to break, counted from 0; each with a probability of `chance` in 1000 */
  int chance, error;     /* error 0: a random one of those that the call may return */
  int delay_ms, shorten; /* wait up to this long; do less than requested */
  int kill;              /* send SIGKILL to the process instead of returning an error */
  int log;
} plan;
static long calls;
static uint64_t state;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

void injector_arm(const char *folder, int only, long first, long count, int chance, int error, int delay_ms, int shorten,
                  int kill, uint64_t seed, int log) {
  plan.only = only, plan.first = first, plan.count = count, plan.chance = chance, plan.error = error;
  plan.delay_ms = delay_ms, plan.shorten = shorten, plan.kill = kill, plan.log = log;
  strncpy(plan.folder, folder, PATH_MAX - 1);
  calls = 0, state = seed * 2862933555777941757ULL + 3037000493ULL;
  plan.armed = 1;
}

long injector_calls(void) { return calls; }

static uint32_t next(void) {
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return state >> 32;
}

static int below(const char *path) {
  size_t n = strlen(plan.folder);
  return !strncmp(path, plan.folder, n) && (path[n] == '/' || !path[n]);
}

static int of_handle(int fd) {
  char link[40], path[PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t n = readlink(link, path, sizeof path - 1);
  return n > 0 && (path[n] = 0, below(path));
}

static int of_path(int at, const char *path) {
  if (path[0] == '/') return below(path);
  char link[40], folder[PATH_MAX];
  if (at == AT_FDCWD) snprintf(link, sizeof link, "/proc/self/cwd");
  else snprintf(link, sizeof link, "/proc/self/fd/%d", at);
  ssize_t n = readlink(link, folder, sizeof folder - 1);
  return n > 0 && (folder[n] = 0, below(folder));
}

static const int ERRORS[][5] = {
    {EMFILE, EIO, ESTALE, EACCES, ENOMEM},     /* OPEN */
    {EIO, ESTALE, ETIMEDOUT, EIO, ENOMEM},     /* READ */
    {ENOSPC, EIO, EDQUOT, ESTALE, ETIMEDOUT},  /* WRITE */
    {EIO, ESTALE, EACCES, ENOSPC, ETIMEDOUT},  /* RENAME */
    {EIO, ENOSPC, ESTALE, EDQUOT, ETIMEDOUT},  /* FSYNC */
    {EIO, ESTALE, EACCES, EBUSY, ETIMEDOUT},   /* UNLINK */
};

/* The error to return; 0: none; -1: do less than requested. */
static int broken(int operation, const char *name, int fd, const char *path) {
  if (!(plan.only & operation)) return 0;
  pthread_mutex_lock(&lock);
  long call = calls++;
  int hit = call >= plan.first && call < plan.first + plan.count && (int)(next() % 1000) < plan.chance;
  uint32_t random = next();
  pthread_mutex_unlock(&lock);
  if (!hit) return 0;
  int result = plan.error ? plan.error : ERRORS[__builtin_ctz(operation)][random % 5];
  if (plan.shorten || plan.delay_ms) result = plan.shorten ? -1 : 0;
  char said[PATH_MAX + 100], link[40];
  if (!path) {
    static __thread char of[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, of, sizeof of - 1);
    of[n > 0 ? n : 0] = 0, path = of;
  }
  int n = snprintf(said, sizeof said, "%ld %s %d %s\n", call, name, plan.kill ? SIGKILL : result, path);
  syscall(SYS_write, plan.log, said, n);
  if (plan.kill) kill(getpid(), SIGKILL);
  if (plan.delay_ms) {
    struct timespec wait = {0, 1000000L * (random % plan.delay_ms)};
    nanosleep(&wait, NULL);
  }
  return result;
}

#define REAL(name) \
  static __typeof__(&name) real; \
  if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define FAIL(code) return errno = (code), -1

#define OPENING(name, head, at, args) \
  int name head { \
    REAL(name); \
    mode_t mode = 0; \
    if (flags & (O_CREAT | O_TMPFILE)) { \
      va_list more; \
      va_start(more, flags), mode = va_arg(more, mode_t), va_end(more); \
    } \
    int e = plan.armed && of_path(at, path) ? broken(OPEN, #name, -1, path) : 0; \
    if (e > 0) FAIL(e); \
    return real args; \
  }
OPENING(open, (const char *path, int flags, ...), AT_FDCWD, (path, flags, mode))
OPENING(open64, (const char *path, int flags, ...), AT_FDCWD, (path, flags, mode))
OPENING(openat, (int at, const char *path, int flags, ...), at, (at, path, flags, mode))
OPENING(openat64, (int at, const char *path, int flags, ...), at, (at, path, flags, mode))

#define MOVING(type, name, operation, head, args, less) \
  type name head { \
    REAL(name); \
    int e = plan.armed && of_handle(fd) ? broken(operation, #name, fd, NULL) : 0; \
    if (e > 0) FAIL(e); \
    if (e < 0) less; \
    return real args; \
  }
#define HALF size = size > 1 ? size / 2 : size
#define ONE count = count > 1 ? 1 : count
MOVING(ssize_t, read, READ, (int fd, void *buffer, size_t size), (fd, buffer, size), HALF)
MOVING(ssize_t, pread, READ, (int fd, void *buffer, size_t size, off_t at), (fd, buffer, size, at), HALF)
MOVING(ssize_t, pread64, READ, (int fd, void *buffer, size_t size, off64_t at), (fd, buffer, size, at), HALF)
MOVING(ssize_t, readv, READ, (int fd, const struct iovec *pieces, int count), (fd, pieces, count), ONE)
MOVING(ssize_t, preadv, READ, (int fd, const struct iovec *pieces, int count, off_t at), (fd, pieces, count, at), ONE)
MOVING(ssize_t, write, WRITE, (int fd, const void *buffer, size_t size), (fd, buffer, size), HALF)
MOVING(ssize_t, pwrite, WRITE, (int fd, const void *buffer, size_t size, off_t at), (fd, buffer, size, at), HALF)
MOVING(ssize_t, pwrite64, WRITE, (int fd, const void *buffer, size_t size, off64_t at), (fd, buffer, size, at), HALF)
MOVING(ssize_t, writev, WRITE, (int fd, const struct iovec *pieces, int count), (fd, pieces, count), ONE)
MOVING(ssize_t, pwritev, WRITE, (int fd, const struct iovec *pieces, int count, off_t at), (fd, pieces, count, at), ONE)
MOVING(int, fsync, FSYNC, (int fd), (fd), )
MOVING(int, fdatasync, FSYNC, (int fd), (fd), )

#define NAMED(name, operation, head, at, path, args) \
  int name head { \
    REAL(name); \
    int e = plan.armed && of_path(at, path) ? broken(operation, #name, -1, path) : 0; \
    if (e > 0) FAIL(e); \
    return real args; \
  }
NAMED(rename, RENAME, (const char *from, const char *to), AT_FDCWD, from, (from, to))
NAMED(renameat, RENAME, (int at, const char *from, int there, const char *to), at, from, (at, from, there, to))
NAMED(renameat2, RENAME, (int at, const char *from, int there, const char *to, unsigned flags), at, from,
      (at, from, there, to, flags))
NAMED(unlink, UNLINK, (const char *path), AT_FDCWD, path, (path))
NAMED(unlinkat, UNLINK, (int at, const char *path, int flags), at, path, (at, path, flags))
NAMED(rmdir, UNLINK, (const char *path), AT_FDCWD, path, (path))
