/* Makes chosen system calls of a running program fail, or kills it there. Loaded with LD_PRELOAD; see injection.py.

   FAULTS_CONTROL  a file of RULES rules, mapped and shared: they can be set while the program runs, and their counters
                   outlive it, so that a rule which has fired does not fire again after a restart
   FAULTS_JOURNAL  what fires is appended here, and all that the program writes to standard error, before any failure
   FAULTS_TRAINER  a module to start in place of edge_client.trainer.process
   FAULTS_PARENT   the process whose child must not outlive it

   Only files are touched: sockets have no path that a pattern could mean. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define RULES 8
#define ARGUMENTS 64

enum { WRITE = 1, SYNC = 2, RENAME = 4, UNLINK = 8, MKDIR = 16, OPEN = 32, TRUNCATE = 64 };
enum { OBSERVE = 0, FAIL = 1, KILL_BEFORE = 2, KILL_AFTER = 3 };

struct rule {
    uint32_t armed;
    uint32_t calls;  /* which of them count, as a mask */
    uint32_t action;
    int32_t error;   /* errno of FAIL */
    int32_t after;   /* counts only once this rule has seen a call; -1: always */
    uint32_t first;  /* the call at which it begins, from 1 */
    uint32_t count;  /* how many calls it lasts; 0: until it is disarmed */
    uint32_t seen;   /* calls so far */
    uint32_t fired;
    uint32_t unused;
    char program[64];  /* a part of the command line */
    char path[152];    /* a pattern of fnmatch; "<stderr>" for descriptor 2 */
};

static struct rule *rules;
static int journal = -1;
static char command[1024];
static char library[PATH_MAX];

static const char *name_of(uint32_t call) {
    switch (call) {
    case WRITE: return "write";
    case SYNC: return "fsync";
    case RENAME: return "rename";
    case UNLINK: return "unlink";
    case MKDIR: return "mkdir";
    case OPEN: return "open";
    default: return "truncate";
    }
}

static int high(int descriptor) {
    /* Out of the way of programs that expect the lowest numbers. */
    int moved = (int)syscall(SYS_fcntl, descriptor, F_DUPFD_CLOEXEC, 500);
    syscall(SYS_close, descriptor);
    return moved;
}

__attribute__((constructor)) static void begin(void) {
    const char *control = getenv("FAULTS_CONTROL"), *written = getenv("FAULTS_JOURNAL");
    if (!control || !written) return;
    const char *parent = getenv("FAULTS_PARENT");
    if (parent && atoi(parent) == (int)getppid()) prctl(PR_SET_PDEATHSIG, SIGKILL);
    int descriptor = (int)syscall(SYS_openat, AT_FDCWD, "/proc/self/cmdline", O_RDONLY | O_CLOEXEC, 0);
    if (descriptor >= 0) {
        long got = syscall(SYS_read, descriptor, command, sizeof command - 1);
        for (long i = 0; i + 1 < got; i++)
            if (!command[i]) command[i] = ' ';
        syscall(SYS_close, descriptor);
    }
    Dl_info info;
    if (dladdr((void *)name_of, &info)) snprintf(library, sizeof library, "%s", info.dli_fname);
    descriptor = (int)syscall(SYS_openat, AT_FDCWD, control, O_RDWR | O_CLOEXEC, 0);
    if (descriptor < 0) return;
    void *mapped = mmap(NULL, RULES * sizeof(struct rule), PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
    syscall(SYS_close, descriptor);
    if (mapped == MAP_FAILED) return;
    journal = (int)syscall(SYS_openat, AT_FDCWD, written, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0644);
    if (journal >= 0) journal = high(journal);
    rules = mapped;
}

static void note(const struct rule *rule, uint32_t call, const char *path, uint32_t number) {
    char line[PATH_MAX + 256];
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    const char *action = rule->action == OBSERVE ? "observe" : rule->action == FAIL ? "fail" : "kill";
    int length = snprintf(line, sizeof line, "\n@%ld.%03ld %d %d %s %s %d %u %s\n", (long)now.tv_sec,
                          now.tv_nsec / 1000000, (int)getpid(), (int)(rule - rules), action, name_of(call),
                          rule->error, number, path);
    if (journal >= 0) syscall(SYS_write, journal, line, length);
}

/* The error to fail with, 0 to go on, -1 to go on and be killed afterwards. */
static int decide(uint32_t call, const char *path) {
    int verdict = 0;
    for (int i = 0; i < RULES; i++) {
        struct rule *rule = &rules[i];
        if (!__atomic_load_n(&rule->armed, __ATOMIC_ACQUIRE) || !(rule->calls & call)) continue;
        if (rule->after >= 0 && !__atomic_load_n(&rules[rule->after].seen, __ATOMIC_ACQUIRE)) continue;
        if (!strstr(command, rule->program) || fnmatch(rule->path, path, 0)) continue;
        uint32_t number = __atomic_add_fetch(&rule->seen, 1, __ATOMIC_ACQ_REL);
        if (number < rule->first || (rule->count && number >= rule->first + rule->count)) continue;
        __atomic_add_fetch(&rule->fired, 1, __ATOMIC_ACQ_REL);
        note(rule, call, path, number);
        if (rule->action == KILL_BEFORE) syscall(SYS_kill, syscall(SYS_getpid), SIGKILL);
        if (rule->action == KILL_AFTER) verdict = -1;
        if (rule->action == FAIL && !verdict) verdict = rule->error;
    }
    return verdict;
}

static int wanted(uint32_t call) {
    if (!rules) return 0;
    for (int i = 0; i < RULES; i++)
        if (__atomic_load_n(&rules[i].armed, __ATOMIC_ACQUIRE) && (rules[i].calls & call)) return 1;
    return 0;
}

static int decide_descriptor(uint32_t call, int descriptor) {
    char link[40], path[PATH_MAX];
    if (!wanted(call)) return 0;
    if (descriptor == 2) return decide(call, "<stderr>");
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    long length = syscall(SYS_readlinkat, AT_FDCWD, link, path, sizeof path - 1);
    if (length <= 0 || path[0] != '/') return 0;
    path[length] = 0;
    return decide(call, path);
}

static int decide_path(uint32_t call, int folder, const char *name) {
    char link[40], path[2 * PATH_MAX];
    if (!wanted(call) || !name) return 0;
    if (name[0] == '/') return decide(call, name);
    if (folder == AT_FDCWD) snprintf(link, sizeof link, "/proc/self/cwd");
    else snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    long length = syscall(SYS_readlinkat, AT_FDCWD, link, path, PATH_MAX - 1);
    if (length <= 0) return 0;
    snprintf(path + length, sizeof path - (size_t)length, "/%s", name);
    return decide(call, path);
}

static long finish(int verdict, long result) {
    if (verdict == -1) syscall(SYS_kill, syscall(SYS_getpid), SIGKILL);
    return result;
}

#define REAL(name) ((__typeof__(name) *)dlsym(RTLD_NEXT, #name))
#define GUARD(verdict)              \
    int verdict_ = (verdict);       \
    if (verdict_ > 0) {             \
        errno = verdict_;           \
        return -1;                  \
    }

static void keep(const void *data, size_t size) {
    if (journal >= 0) syscall(SYS_write, journal, data, size);
}

ssize_t write(int descriptor, const void *data, size_t size) {
    if (descriptor == 2) keep(data, size);
    GUARD(decide_descriptor(WRITE, descriptor));
    return finish(verdict_, REAL(write)(descriptor, data, size));
}

ssize_t writev(int descriptor, const struct iovec *pieces, int count) {
    if (descriptor == 2)
        for (int i = 0; i < count; i++) keep(pieces[i].iov_base, pieces[i].iov_len);
    GUARD(decide_descriptor(WRITE, descriptor));
    return finish(verdict_, REAL(writev)(descriptor, pieces, count));
}

ssize_t pwrite(int descriptor, const void *data, size_t size, off_t offset) {
    GUARD(decide_descriptor(WRITE, descriptor));
    return finish(verdict_, REAL(pwrite)(descriptor, data, size, offset));
}

ssize_t pwrite64(int descriptor, const void *data, size_t size, off64_t offset) {
    GUARD(decide_descriptor(WRITE, descriptor));
    return finish(verdict_, REAL(pwrite64)(descriptor, data, size, offset));
}

ssize_t sendfile(int out, int in, off_t *offset, size_t count) {
    GUARD(decide_descriptor(WRITE, out));
    return finish(verdict_, syscall(SYS_sendfile, out, in, offset, count));
}

ssize_t sendfile64(int out, int in, off64_t *offset, size_t count) {
    GUARD(decide_descriptor(WRITE, out));
    return finish(verdict_, syscall(SYS_sendfile, out, in, offset, count));
}

ssize_t copy_file_range(int in, off64_t *in_offset, int out, off64_t *out_offset, size_t size, unsigned flags) {
    GUARD(decide_descriptor(WRITE, out));
    return finish(verdict_, syscall(SYS_copy_file_range, in, in_offset, out, out_offset, size, flags));
}

int fsync(int descriptor) {
    GUARD(decide_descriptor(SYNC, descriptor));
    return (int)finish(verdict_, REAL(fsync)(descriptor));
}

int fdatasync(int descriptor) {
    GUARD(decide_descriptor(SYNC, descriptor));
    return (int)finish(verdict_, REAL(fdatasync)(descriptor));
}

int ftruncate(int descriptor, off_t size) {
    GUARD(decide_descriptor(TRUNCATE, descriptor));
    return (int)finish(verdict_, REAL(ftruncate)(descriptor, size));
}

int ftruncate64(int descriptor, off64_t size) {
    GUARD(decide_descriptor(TRUNCATE, descriptor));
    return (int)finish(verdict_, REAL(ftruncate64)(descriptor, size));
}

int rename(const char *from, const char *to) {
    GUARD(decide_path(RENAME, AT_FDCWD, to));
    return (int)finish(verdict_, REAL(rename)(from, to));
}

int renameat(int from_folder, const char *from, int to_folder, const char *to) {
    GUARD(decide_path(RENAME, to_folder, to));
    return (int)finish(verdict_, REAL(renameat)(from_folder, from, to_folder, to));
}

int renameat2(int from_folder, const char *from, int to_folder, const char *to, unsigned flags) {
    GUARD(decide_path(RENAME, to_folder, to));
    return (int)finish(verdict_, syscall(SYS_renameat2, from_folder, from, to_folder, to, flags));
}

int unlink(const char *path) {
    GUARD(decide_path(UNLINK, AT_FDCWD, path));
    return (int)finish(verdict_, REAL(unlink)(path));
}

int unlinkat(int folder, const char *path, int flags) {
    GUARD(decide_path(UNLINK, folder, path));
    return (int)finish(verdict_, REAL(unlinkat)(folder, path, flags));
}

int mkdir(const char *path, mode_t mode) {
    GUARD(decide_path(MKDIR, AT_FDCWD, path));
    return (int)finish(verdict_, REAL(mkdir)(path, mode));
}

int mkdirat(int folder, const char *path, mode_t mode) {
    GUARD(decide_path(MKDIR, folder, path));
    return (int)finish(verdict_, REAL(mkdirat)(folder, path, mode));
}

static int opened(int folder, const char *path, int flags, mode_t mode) {
    int writes = (flags & O_ACCMODE) != O_RDONLY || flags & O_CREAT;
    GUARD(writes ? decide_path(OPEN, folder, path) : 0);
    return (int)finish(verdict_, syscall(SYS_openat, folder, path, flags, mode));
}

#define MODE(flags)                                          \
    mode_t mode = 0;                                         \
    if ((flags) & O_CREAT || ((flags) & O_TMPFILE) == O_TMPFILE) { \
        va_list more;                                        \
        va_start(more, flags);                               \
        mode = (mode_t)va_arg(more, int);                    \
        va_end(more);                                        \
    }

int open(const char *path, int flags, ...) {
    MODE(flags);
    return opened(AT_FDCWD, path, flags, mode);
}

int open64(const char *path, int flags, ...) {
    MODE(flags);
    return opened(AT_FDCWD, path, flags | O_LARGEFILE, mode);
}

int openat(int folder, const char *path, int flags, ...) {
    MODE(flags);
    return opened(folder, path, flags, mode);
}

int openat64(int folder, const char *path, int flags, ...) {
    MODE(flags);
    return opened(folder, path, flags | O_LARGEFILE, mode);
}

/* Another trainer for the agent; a real one gets this library beside the allocator that the agent preloads. */
int execve(const char *path, char *const arguments[], char *const environment[]) {
    const char *module = getenv("FAULTS_TRAINER");
    char *replaced[ARGUMENTS + 1], *variables[1024], preload[2 * PATH_MAX];
    int count = 0, trainer = 0;
    for (; rules && arguments[count] && count < ARGUMENTS; count++) {
        replaced[count] = arguments[count];
        if (!strcmp(arguments[count], "edge_client.trainer.process")) {
            trainer = 1;
            if (module && *module) replaced[count] = (char *)module;
        }
    }
    if (!trainer || arguments[count])
        return (int)syscall(SYS_execve, path, arguments, environment);
    replaced[count] = NULL;
    int i = 0;
    for (; environment[i] && i < 1023; i++) {
        variables[i] = environment[i];
        if (!strncmp(environment[i], "LD_PRELOAD=", 11) && !strstr(environment[i], library)) {
            snprintf(preload, sizeof preload, "LD_PRELOAD=%s:%s", library, environment[i] + 11);
            variables[i] = preload;
        }
    }
    variables[i] = NULL;
    return (int)syscall(SYS_execve, path, replaced, variables);
}
