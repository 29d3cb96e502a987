/* LD_PRELOAD: a disk that loses its power, or fails.
 *
 * After each successful fdatasync of a file in DIRECTORY, which is how SQLite syncs in apsw, DIRECTORY/.synced holds a
 * copy of what was in it when the sync was asked for; nothing happens where there is no DIRECTORY/.synced. A power cut
 * is then: kill all, and take the copies. What was never synced is gone. SQLite syncs the directory after it made or
 * removed a file: a sync of DIRECTORY removes the copies of files that are no longer in it.
 *
 * FAIL_AT=N lets the Nth call of this process fail that writes to, cuts or syncs a file in the directory
 * FAIL_IN, and makes the file FAIL_IN/.failed; FAIL_ON=1 all that follow it too. FAIL_ERROR: the errno. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <unistd.h>

static int path_of(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    path[length > 0 ? length : 0] = 0;
    return length > 0;
}

static int fails(int fd) {
    static atomic_int calls;
    const char *at = getenv("FAIL_AT"), *in = getenv("FAIL_IN");
    char path[PATH_MAX], mark[PATH_MAX];
    if (at == NULL || in == NULL || !path_of(fd, path) || strncmp(path, in, strlen(in)) || !strstr(path, ".sqlite3"))
        return 0;
    int number = ++calls, first = atoi(at);
    if (number < first || (number > first && getenv("FAIL_ON") == NULL))
        return 0;
    snprintf(mark, sizeof mark, "%s/.failed", in);
    close(open(mark, O_WRONLY | O_CREAT | O_CLOEXEC, 0600));
    errno = atoi(getenv("FAIL_ERROR"));
    return 1;
}

static int copy(int fd, const char *to) {
    struct stat found;
    off_t at = 0;
    int out = open(to, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (out < 0 || fstat(fd, &found) != 0)
        return -1;
    /* Through the same descriptor: to close another one of the file would drop its locks. */
    while (at < found.st_size && sendfile(out, fd, &at, found.st_size - at) > 0)
        ;
    close(out);
    return at == found.st_size ? 0 : -1;
}

static void forget_unlinked(const char *directory) {
    char path[PATH_MAX * 2];
    snprintf(path, sizeof path, "%s/.synced", directory);
    DIR *copies = opendir(path);
    struct dirent *entry;
    while (copies != NULL && (entry = readdir(copies)) != NULL) {
        snprintf(path, sizeof path, "%s/%s", directory, entry->d_name);
        if (entry->d_name[0] != '.' && access(path, F_OK) != 0) {
            snprintf(path, sizeof path, "%s/.synced/%s", directory, entry->d_name);
            unlink(path);
        }
    }
    if (copies != NULL)
        closedir(copies);
}

static int synced(int fd) {
    int (*sync_)(int) = dlsym(RTLD_NEXT, "fdatasync");
    char path[PATH_MAX], lock[PATH_MAX + 32], fresh[PATH_MAX + 32], kept[PATH_MAX + 32];
    struct stat found;
    if (fails(fd))
        return -1;
    if (!path_of(fd, path) || fstat(fd, &found) != 0)
        return sync_(fd);
    if (S_ISDIR(found.st_mode)) {
        int result = sync_(fd);
        if (result == 0)
            forget_unlinked(path);
        return result;
    }
    char *base = strrchr(path, '/');
    if (base == NULL)
        return sync_(fd);
    snprintf(lock, sizeof lock, "%.*s/.synced/.lock", (int)(base - path), path);
    snprintf(fresh, sizeof fresh, "%.*s/.synced/.fresh", (int)(base - path), path);
    snprintf(kept, sizeof kept, "%.*s/.synced/%s", (int)(base - path), path, base + 1);
    int locked = open(lock, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (locked < 0)
        return sync_(fd);
    flock(locked, LOCK_EX);
    int copied = copy(fd, fresh), result = sync_(fd);
    if (result == 0 && copied == 0)
        rename(fresh, kept);
    close(locked);
    return result;
}

int fdatasync(int fd) { return synced(fd); }
ssize_t pwrite64(int fd, const void *data, size_t count, off64_t at) {
    ssize_t (*write_)(int, const void *, size_t, off64_t) = dlsym(RTLD_NEXT, "pwrite64");
    return fails(fd) ? -1 : write_(fd, data, count, at);
}
int ftruncate64(int fd, off64_t size) {
    int (*cut)(int, off64_t) = dlsym(RTLD_NEXT, "ftruncate64");
    return fails(fd) ? -1 : cut(fd, size);
}
