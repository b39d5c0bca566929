/* A stand-in for qemu-img that does what the first bytes of the image tell it to do.
 *
 * It runs where qemu-img runs, sandbox and all. The image is the last argument but one, as a JSON
 * graph; the result is the last. Both are /proc/self/fd/N. `info` is not understood: the tests say
 * that their images are raw.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static char order[64];
static char image[1 << 20];

static int is(const char *what) { return !strncmp(order, what, strlen(what)); }

static int open_source(const char *graph) {
  const char *found = strstr(graph, "/proc/self/fd/");
  char path[64] = "";
  if (found)
    sscanf(found, "%63[/a-z0-9]", path);
  return open(path, O_RDONLY);
}

/* Fail as qemu-img does on a busy machine, until so many bytes in the result count the failures. */
static int not_measured(const char *path, int times) {
  struct stat found;
  int out = open(path, O_WRONLY | O_APPEND);
  if (out < 0 || fstat(out, &found) || found.st_size >= times)
    return 0;
  if (write(out, "x", 1) != 1)
    perror("stand-in");
  fprintf(stderr, "qemu-img: %s: error while converting %s: Unable to get accurate CPU usage\n", path,
          is("not measured to raw") ? "raw" : "luks");
  return 1;
}

/* Write the image, or the first half of it. */
static void copy(int in, const char *path, int half) {
  int out = open(path, O_WRONLY);
  ssize_t got = pread(in, image, sizeof image, 0);
  if (out < 0 || got < 0 || write(out, image, half ? got / 2 : got) < 0)
    perror("stand-in");
}

static void hang(void) {
  for (;;)
    pause();
}

int main(int argc, char **argv) {
  int in = argc > 2 ? open_source(argv[argc - 2]) : -1;
  const char *out = argv[argc - 1];
  if (in < 0 || pread(in, order, sizeof order - 1, 0) < 0)
    return 3;

  if (is("hang"))
    hang();
  if (is("ignore signals")) {
    for (int number = 1; number < 32; number++)
      signal(number, SIG_IGN);
    hang();
  }
  if (is("close outputs and hang")) {
    close(1);
    close(2);
    hang();
  }
  if (is("progress without end")) {
    /* Negative, too large, no number, no end of line, backwards. */
    for (int turn = 0; turn < 5000; turn++)
      printf("    (-5/100%%)\r (99999999999999999999.9/100%%)\r (nan/100%%)\r(7.5/100%%)\r"
             "(100.00/100%%)\r(1.00/100%%)\r%s", turn % 100 ? "\n" : "\377\376\0\033[2J");
    for (int turn = 0; turn < 4 << 20; turn++)
      putchar('(');
    fflush(stdout);
    copy(in, out, 0);
    return 0;
  }
  if (is("flood stderr")) {
    for (int turn = 0; turn < 1 << 16; turn++)
      fputs("a line of nothing but complaint, again and again\n", stderr);
    copy(in, out, 0);
    return 0;
  }
  if (is("complain and succeed")) {
    fputs("qemu-img: warning: all is not well\n\033[31m\377 and more\n", stderr);
    copy(in, out, 0);
    return 0;
  }
  if (is("write nothing and succeed"))
    return 0;
  if (is("write half and succeed")) {
    copy(in, out, 1);
    return 0;
  }
  if (is("write half and fail")) {
    copy(in, out, 1);
    return 1;
  }
  if (is("write half and crash")) {
    copy(in, out, 1);
    abort();
  }
  if (is("leave a child")) {
    pid_t pid = fork();
    if (pid == 0)
      hang();
    if (pid > 0)
      return 0;
    perror("fork");
    return 1;
  }
  if (is("start another program")) {
    char *arguments[] = {"sleep", "1000", NULL};
    execv("/bin/sleep", arguments);
    perror("execv");
    return 1;
  }
  if (is("use all memory")) {
    for (;;) {
      char *block = malloc(1 << 20);
      if (!block)
        break;
      memset(block, 1, 1 << 20);
    }
    fputs("qemu-img: cannot allocate memory\n", stderr);
    return 1;
  }
  if (is("use all time"))
    for (;;)
      ;
  if (is("write for ever")) {
    int fd = open(out, O_WRONLY);
    while (write(fd, image, sizeof image) > 0)
      usleep(50000);
    fputs("qemu-img: error while writing at byte 0: No space left on device\n", stderr);
    return 1;
  }
  if (is("not measured four times") && not_measured(out, 4))
    return 1;
  if (is("not measured five times") && not_measured(out, 5))
    return 1;
  if (is("not measured to raw") && not_measured(out, 1))
    return 1;
  if (is("shrink")) {
    copy(in, out, 0);
    return ftruncate(open(out, O_WRONLY), 512) != 0;
  }
  copy(in, out, 0);
  return 0;
}
