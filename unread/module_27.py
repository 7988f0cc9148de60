def function_27(x):
    return x + 27
def function_27(x):
    return x + 27
def function_27(x):
    return x + 27
def function_27(x):
    return x + 27
def function_27(x):
    return x + 27
