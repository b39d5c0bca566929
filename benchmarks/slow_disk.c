// A file in memory behind FUSE, as slow as a disk: slow_disk FILE LATENCY_US RATE_MB TOTAL_MB MOUNTPOINT
//
// Each request takes LATENCY_US and its size at RATE_MB a second; requests run at the same time, but
// not faster than TOTAL_MB a second together. So only who has several under way is fast, as on a disk
// that is reached through a network. The mount point has one file, `disk`, with the content of FILE.

#define FUSE_USE_VERSION 31
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <fuse.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static int file;
static double latency_s, rate, total;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static double free_at_s;

static double now_s(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec + now.tv_nsec / 1e9;
}

static void take_time(size_t bytes) {
  double began = now_s();
  pthread_mutex_lock(&lock);
  free_at_s = (free_at_s > began ? free_at_s : began) + bytes / total;
  double end = free_at_s;
  pthread_mutex_unlock(&lock);
  double alone = began + latency_s + bytes / rate;
  if (alone > end) end = alone;
  struct timespec until = {(time_t)end, (long)((end - (time_t)end) * 1e9)};
  while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL) == EINTR) continue;
}

static int get_attributes(const char *path, struct stat *status, struct fuse_file_info *info) {
  (void)info;
  memset(status, 0, sizeof *status);
  if (strcmp(path, "/") == 0) {
    status->st_mode = S_IFDIR | 0755;
    status->st_nlink = 2;
    return 0;
  }
  if (strcmp(path, "/disk") != 0) return -ENOENT;
  return fstat(file, status) ? -errno : 0;
}

static int read_disk(const char *path, char *data, size_t size, off_t at, struct fuse_file_info *info) {
  (void)path, (void)info;
  take_time(size);
  ssize_t done = pread(file, data, size, at);
  return done < 0 ? -errno : (int)done;
}

static int write_disk(const char *path, const char *data, size_t size, off_t at,
                      struct fuse_file_info *info) {
  (void)path, (void)info;
  take_time(size);
  ssize_t done = pwrite(file, data, size, at);
  return done < 0 ? -errno : (int)done;
}

static int flush_disk(const char *path, int data_only, struct fuse_file_info *info) {
  (void)path, (void)data_only, (void)info;
  take_time(0);
  return 0;
}

static int discard(const char *path, int mode, off_t at, off_t size, struct fuse_file_info *info) {
  (void)path, (void)info;
  return fallocate(file, mode, at, size) ? -errno : 0;
}

static void *set_up(struct fuse_conn_info *connection, struct fuse_config *config) {
  (void)config;
  connection->max_write = 1 << 20;
  connection->max_background = connection->congestion_threshold = 256;
  return NULL;
}

static const struct fuse_operations operations = {
    .init = set_up,
    .getattr = get_attributes,
    .read = read_disk,
    .write = write_disk,
    .fsync = flush_disk,
    .fallocate = discard,
};

int main(int count, char **arguments) {
  if (count != 6) return 2;
  file = open(arguments[1], O_RDWR | O_CLOEXEC);
  if (file < 0) return 1;
  latency_s = atof(arguments[2]) / 1e6;
  rate = atof(arguments[3]) * 1e6;
  total = atof(arguments[4]) * 1e6;
  char *fuse[] = {arguments[0], "-f", "-o", "max_threads=64,max_idle_threads=64", arguments[5], NULL};
  return fuse_main(5, fuse, &operations, NULL);
}
