/* Preloaded: while the file $AWAY_WHILE is there, calls on what lies below $AWAY_BELOW fail with the errno it holds, as
 * those of a shared folder do whose server is gone. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static int away(const char *path) {
    const char *below = getenv("AWAY_BELOW"), *flag = getenv("AWAY_WHILE");
    char number[16] = "";
    int file, given = 0, kept = errno;
    if (!path || !below || !flag || strncmp(path, below, strlen(below))) return 0;
    file = syscall(SYS_openat, AT_FDCWD, flag, O_RDONLY);
    if (file >= 0) {
        if (syscall(SYS_read, file, number, sizeof number - 1) > 0) given = atoi(number);
        syscall(SYS_close, file);
    }
    errno = given ? given : kept;
    return given;
}

static int away_fd(int fd) {
    char link[32], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    long length = syscall(SYS_readlinkat, AT_FDCWD, link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return away(path);
}

#define REAL(name) ((__typeof__(name) *)dlsym(RTLD_NEXT, #name))
#define ONE(type, name, takes, gives, path) \
    type name takes { return away(path) ? (type)-1 : REAL(name) gives; }
#define FD(type, name, takes, gives, fd) \
    type name takes { return away_fd(fd) ? (type)-1 : REAL(name) gives; }
#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        va_list list; va_start(list, flags); mode_t mode = va_arg(list, mode_t); va_end(list); \
        return away(path) ? -1 : REAL(name)(path, flags, mode); }
#define OPENAT(name) \
    int name(int at, const char *path, int flags, ...) { \
        va_list list; va_start(list, flags); mode_t mode = va_arg(list, mode_t); va_end(list); \
        return away(path) || (*path != '/' && at >= 0 && away_fd(at)) ? -1 : REAL(name)(at, path, flags, mode); }

OPEN(open) OPEN(open64) OPENAT(openat) OPENAT(openat64)
ONE(int, stat, (const char *path, struct stat *to), (path, to), path)
ONE(int, stat64, (const char *path, struct stat64 *to), (path, to), path)
ONE(int, lstat, (const char *path, struct stat *to), (path, to), path)
ONE(int, lstat64, (const char *path, struct stat64 *to), (path, to), path)
ONE(int, fstatat, (int at, const char *path, struct stat *to, int how), (at, path, to, how), path)
ONE(int, fstatat64, (int at, const char *path, struct stat64 *to, int how), (at, path, to, how), path)
ONE(int, statx, (int at, const char *path, int how, unsigned mask, struct statx *to), (at, path, how, mask, to), path)
ONE(int, mkdir, (const char *path, mode_t mode), (path, mode), path)
ONE(int, rmdir, (const char *path), (path), path)
ONE(int, unlink, (const char *path), (path), path)
ONE(int, rename, (const char *from, const char *to), (from, to), to)
FD(ssize_t, write, (int fd, const void *from, size_t size), (fd, from, size), fd)
FD(int, fsync, (int fd), (fd), fd)
DIR *opendir(const char *path) { return away(path) ? NULL : REAL(opendir)(path); }
FILE *fopen64(const char *path, const char *how) { return away(path) ? NULL : REAL(fopen64)(path, how); }
